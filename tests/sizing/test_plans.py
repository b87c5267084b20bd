"""Plans of a run."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from hf_context_parallel.memory.advice import by_size
from hf_context_parallel.memory.facts import ModelFacts, facts_of
from hf_context_parallel.memory.job import Job
from hf_context_parallel.memory.parts import parts_of
from hf_context_parallel.sizing.gpus import find_gpu, rates_of
from hf_context_parallel.sizing.meshes import Mesh
from hf_context_parallel.sizing.plans import STEP, Plan, Question, longest_plans, plans_of
from hf_context_parallel.sizing.speed import Choice, work_of


@pytest.fixture
def question(llama_8b):
    return Question(facts_of(AutoConfig.from_pretrained(llama_8b)), 8, 32768, rates_of(find_gpu("h100")))


def test_the_memory_is_that_of_the_memory_model(question):
    plan = Plan(question, Mesh(2, 4, 4, 1, "a2a+p2p", 2), Choice("device", True, 2048))
    job = Job(
        question.facts,
        32768,
        cp=4,
        tp=2,
        fsdp=4,
        comm_type="a2a+p2p",
        a2a_size=2,
        kernel="cudnn",
        offload=True,
        attention_checkpoints="device",
        tile_tokens=2048,
        sharded=True,
    )
    assert plan.parts == parts_of(job)


def test_weights_in_float32_beside_layers_in_bfloat16(question):
    narrow = Plan(question, Mesh(1, 8, 8, 1), Choice())
    mixed = Plan(replace(question, weights=torch.float32), narrow.mesh, narrow.choice)
    for name, phase in narrow.parts.phases.items():
        there = mixed.parts.phases[name]
        assert (there.layer, there.checkpoints, there.loss) == (phase.layer, phase.checkpoints, phase.loss)
        assert there.optimizer == 2 * phase.optimizer
        assert there.weights == 2 * phase.weights


def test_plans_fit_and_are_sorted(question):
    answer = plans_of(question)
    assert all(plan.parts.total <= question.rates.memory for plan in answer.fitting)
    speeds = [plan.step.tokens_per_second for plan in answer.fitting]
    assert all(later < 1.02 * earlier for earlier, later in zip(speeds, speeds[1:]))
    assert {(plan.mesh.tp, plan.mesh.cp) for plan in answer.best()} | {
        (plan.mesh.tp, plan.mesh.cp) for plan in answer.others
    } == {(tp, cp) for tp in (1, 2, 4, 8) for cp in (1, 2, 4, 8) if tp * cp <= 8}


def test_what_does_not_fit_is_the_plan_that_needs_the_least(question):
    tight = replace(question, rates=question.rates._replace(memory=20 * 2**30), length=131072)
    answer = plans_of(tight)
    assert answer.others
    for plan in answer.others:
        assert plan.parts.total > tight.rates.memory
        assert (plan.mesh.tp, plan.mesh.cp) not in {(found.mesh.tp, found.mesh.cp) for found in answer.fitting}


def test_the_longest_sequence_fits_and_the_next_does_not(question):
    plan = Plan(question, Mesh(1, 4, 8, 1), Choice("device"))
    assert plan.longest % STEP == 0
    assert plan.parts_at(plan.longest).total <= question.rates.memory < plan.parts_at(plan.longest + STEP).total
    assert Plan(question, Mesh(1, 8, 8, 1), Choice("device")).longest > plan.longest
    nowhere = replace(question, rates=question.rates._replace(memory=2**30))
    assert replace(plan, question=nowhere).longest == 0


def test_longest_plans_are_the_longest_of_their_mesh(question):
    found = longest_plans(question)
    lengths = [plan.longest for plan in found]
    assert lengths == sorted(lengths, reverse=True)
    first = found[0]
    assert first.mesh.cp == 8
    every = [
        Plan(question, first.mesh, Choice(kept, offload, tile))
        for kept in ("off", "device", "host")
        for offload in (False, True)
        for tile in (None, 8192, 2048)
    ]
    assert first.longest == max(plan.longest for plan in every)


def test_attention_of_transformers_is_not_kept(question):
    alone = [plan for plan in plans_of(question).fitting if plan.mesh.cp == 1]
    assert {plan.choice.kept for plan in alone if plan.choice.tile_tokens is None} == {"off"}
    assert {plan.choice.kept for plan in alone if plan.choice.tile_tokens} == {"off", "device", "host"}


def test_tokens_of_a_step_limit_the_groups_and_set_the_runs(question):
    asked = replace(question, tokens=4 * 32768)
    found = set(asked.meshes())
    assert max(mesh.groups for mesh in found) == 4
    by_groups = {mesh.groups: asked.runs(mesh) for mesh in found}
    assert by_groups == {1: 4, 2: 2, 4: 1}
    assert Plan(asked, Mesh(1, 8, 8, 1), Choice()).step.tokens == 4 * 32768


def test_parts_by_size(question):
    plan = Plan(question, Mesh(1, 8, 8, 1), Choice())
    sizes = [size for _, size in by_size(plan.parts)]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == pytest.approx(plan.parts.total)


def test_work_of_a_dense_model(question):
    work = work_of(question.facts)
    one = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert work.active == 32 * one + 4096  # and the last norm
    assert work.mlp == 32 * 3 * 4096 * 14336
    assert work.head == 128256 * 4096
    assert [layer.layers for layer in work.attention] == [32]


def test_layers_without_experts_count_whole():
    dense, experts = 1000, 3 * 10 * 20 * 8
    facts = ModelFacts(
        layers=4,
        hidden=10,
        intermediate=20,
        heads=1,
        key_heads=1,
        query_dim=10,
        value_dim=10,
        vocabulary=50,
        parameters=4 * dense + 2 * experts + 2 * 500,
        layer_parameters=dense + experts,
        head_parameters=500,
        experts=8,
        active_experts=2,
    )
    assert work_of(facts).active == 4 * dense + 2 * experts - 2 * 3 * 10 * 20 * 6


def test_work_of_experts_counts_those_of_a_token(small_moe):
    facts = facts_of(small_moe)
    work = work_of(facts)
    assert work.mlp == 2 * 2 * 3 * 64 * 32
    assert facts.parameters - work.active == 2 * 64 * 1000 + 2 * 6 * 3 * 64 * 32
