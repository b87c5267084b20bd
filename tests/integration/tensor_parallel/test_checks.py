"""Refusals of tensor-parallel models, on every rank alike."""

from __future__ import annotations

import pytest
import torch

import hf_context_parallel as hcp
from tests.helpers.models import needs_sharding_while_loading
from tests.helpers.tensor_parallel import TP_CP, batch, saved, tensor_parallel_model

pytestmark = needs_sharding_while_loading


def refusal(folder, settings, sizes, with_mesh=True) -> str:
    try:
        model = tensor_parallel_model(folder, dtype=torch.float32, **sizes)
        cp = hcp.ContextParallel(hcp.ContextParallelConfig(**settings), hcp.mesh_of(model) if with_mesh else None)
        with cp.shard(batch(), model):
            pass
    except ValueError as caught:
        return str(caught)
    return "nothing was refused"


REFUSED = {
    "CP does not divide": (
        "llama",
        {"size": 4},
        TP_CP,
        "size=4 does not divide the mesh dimension 'fsdp', which is 2",
    ),
    "nothing to shard over": (
        "llama",
        {"size": 2, "sequence_parallel": True},
        {"fsdp_size": 4},
        "sequence_parallel=True shards activations over the ranks of tensor parallelism, and there is none",
    ),
    "a flag that nothing reads": (
        "llama",
        {"size": 2},
        {**TP_CP, "enable_sequence_parallel": True},
        "Set ContextParallelConfig(sequence_parallel=True), which does it",
    ),
    "heads that are cut": (
        "llama",
        {},
        {"tp_size": 4},
        "tp_size=4 does not divide num_key_value_heads=2",
    ),
    "experts": (
        "qwen3_moe",
        {"size": 2, "sequence_parallel": True},
        TP_CP,
        "sequence_parallel=True: Qwen3MoeForCausalLM has Qwen3MoeDecoderLayer.mlp",
    ),
    "a type that is wrong": ("apertus", {"size": 2}, TP_CP, "model type 'apertus' is refused with tensor parallelism"),
    "a plan of one's own": (
        "llama",
        {"size": 2},
        {**TP_CP, "tp_plan": {"model.layers.*.mlp.up_proj": "colwise_gather_output"}},
        "Leave tp_plan out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused_on_every_rank_alike(on_ranks, tmp_path, case):
    model_type, settings, sizes, message = REFUSED[case]
    answers = on_ranks(4, refusal, saved(tmp_path, model_type), settings, sizes)
    assert message in answers[0] and len(set(answers)) == 1


def test_a_mesh_that_is_not_given_is_asked_for(on_ranks, tmp_path):
    for found in on_ranks(4, refusal, saved(tmp_path, "llama"), {"size": 2}, TP_CP, False):
        assert "ContextParallel(config, mesh=hf_context_parallel.mesh_of(model))" in found
