"""Times and bytes of a step, against numbers made by hand."""

import pytest
import torch

from hf_context_parallel.attention.strategy import Shape
from hf_context_parallel.memory.tower_facts import TowerFacts, TowerSizes
from hf_context_parallel.planning.machine import Machine
from hf_context_parallel.planning.mask import Pattern
from hf_context_parallel.sizing.gpus import Rates
from hf_context_parallel.sizing.meshes import Mesh
from hf_context_parallel.sizing.speed import Attention, Choice, Work, model_flops, step_of

SHAPE = Shape(8, 4, 64, 64, torch.bfloat16)
ONE = Attention(Pattern(), SHAPE, 2)
WORK = Work(2, 512, 1024, 1e6, 6e5, 2e5, 1.5e6, 1.5e6, True, (ONE,))
RATES = Rates(
    Machine(1e9, 5e8, 2e9, 1e9, 1e8, 1e7, latency=0.0, node_latency=0.0, launch=0.0, node=8, overlap=0.0), 1e8, 1e9, ()
)
"""Slow rates, so that nothing waits for the host, and a machine that overlaps no messages of a ring."""
ALONE = Mesh(1, 1, 1, 1)
PAIRS = 100 * 101 / 2
FORWARD = 2 * PAIRS * 8 * (64 + 64) * 2  # operations of two layers


def messages(step):
    return {found.purpose.split(":")[0]: found for found in step.messages}


def test_one_rank():
    step = step_of(WORK, ALONE, Choice(), 100, 1, 1, RATES)
    parts = step.parts
    assert parts["matrix products"] == pytest.approx(8 * 1.2e6 * 100 / 2e9)
    assert parts["attention"] == pytest.approx(2 * FORWARD / 1e9 + 2.5 * FORWARD / 5e8)
    assert parts["element-wise work"] == pytest.approx(4 * 2 * 100 * (16 * 512 + 4 * 1024) * 2 / 1e9)
    assert parts["optimizer"] == pytest.approx(32 * 1.5e6 / 1e9)
    assert sum(seconds for name, seconds in parts.items() if "messages" in name or "host" in name) == 0
    assert all(found[1:] == (0, 0, 0) for found in step.messages)
    assert step.tokens == 100
    assert step.flops == pytest.approx(6 * 1.2e6 * 100 + 3 * FORWARD)
    assert step.tokens_per_second == pytest.approx(100 / sum(parts.values()))
    assert step.tflops == pytest.approx(step.flops / sum(parts.values()) / 1e12)


def test_kept_attention_saves_a_forward_pass():
    again, kept = (step_of(WORK, ALONE, Choice(where), 100, 1, 1, RATES).parts for where in ("off", "device"))
    assert again["attention"] - kept["attention"] == pytest.approx(FORWARD / 1e9)


def test_frozen_matrices_have_no_gradients():
    frozen = WORK._replace(weights_trained=False, trained=1e4)
    step = step_of(frozen, ALONE, Choice(), 100, 1, 1, RATES)
    assert step.parts["matrix products"] == pytest.approx(6 * 1.2e6 * 100 / 2e9)
    assert step.parts["optimizer"] == pytest.approx(32 * 1e4 / 1e9)
    assert model_flops(frozen, 100) == pytest.approx(4 * 1.2e6 * 100 + 3 * FORWARD)


def test_a_window_computes_what_it_reads():
    windowed = WORK._replace(attention=(ONE._replace(pattern=Pattern(True, 10)),))
    step = step_of(windowed, ALONE, Choice("device"), 100, 1, 1, RATES)
    pairs = 10 * 11 / 2 + 90 * 10
    assert step.parts["attention"] == pytest.approx(FORWARD / PAIRS * pairs * (1 / 1e9 + 2.5 / 5e8))


def test_tiles_compute_the_mlp_once_more():
    whole, tiled = (step_of(WORK, ALONE, Choice("off", False, tile), 100, 1, 1, RATES).parts for tile in (None, 32))
    assert tiled["matrix products"] - whole["matrix products"] == pytest.approx(2 * 6e5 * 100 / 2e9)


def test_a_ring_of_two_sends_keys_and_the_sums_of_their_gradients():
    step = step_of(WORK, Mesh(1, 2, 2, 1), Choice("device"), 100, 1, 1, RATES)
    numbers = 4 * (64 + 64)
    # Of four chunks the first rank holds 0 and 3, and reads 1 and 2. The second reads chunk 0.
    assert messages(step)["CP"].near == pytest.approx(2 * 50 * numbers * (2 + 2 + 4))
    again = step_of(WORK, Mesh(1, 2, 2, 1), Choice("off"), 100, 1, 1, RATES)
    assert messages(again)["CP"].near == pytest.approx(2 * 50 * numbers * (2 + 2 + 2 + 4))
    assert again.parts["messages of CP"] > step.parts["messages of CP"] > 0


def test_tensor_parallelism_reduces_six_times_a_layer():
    step = step_of(WORK, Mesh(4, 1, 1, 1), Choice(), 100, 1, 1, RATES)
    sent = 2 * 6 * 2 * 100 * 512 * 2 * 3 / 4
    assert messages(step)["TP"].near == pytest.approx(sent)
    assert step.parts["messages of TP"] == pytest.approx(sent / 1e8)
    assert step.parts["matrix products"] == pytest.approx(8 * 1.2e6 * 100 / 4 / 2e9)


def test_fsdp_gathers_twice_a_run_and_reduces_in_float32():
    step = step_of(WORK, Mesh(1, 1, 4, 1), Choice(), 100, 1, 3, RATES)
    assert messages(step)["FSDP"].near == pytest.approx(3 * 1.5e6 * (2 * 2 + 4) * 3 / 4)
    assert step.parts["optimizer"] == pytest.approx(32 * 1.5e6 / 4 / 1e9)
    assert step.tokens == 1200


def test_messages_of_fsdp_hide_behind_matrix_products():
    short = step_of(WORK, Mesh(1, 1, 4, 1), Choice(), 4, 1, 1, RATES).parts
    behind = short["matrix products"] + short["element-wise work"]
    sent = 1.5e6 * 8 * 3 / 4
    assert short["messages of FSDP and replicas"] == pytest.approx(sent / 1e8 - behind)
    long = step_of(WORK, Mesh(1, 1, 4, 1), Choice(), 4000, 1, 1, RATES).parts
    assert long["messages of FSDP and replicas"] == 0


def test_replicas_average_gradients_once_a_step():
    step = step_of(WORK, Mesh(1, 1, 2, 2), Choice(), 100, 1, 5, RATES)
    assert messages(step)["replicas"].near == pytest.approx(2 * 4 * 1.5e6 / 2 / 2)


def test_what_a_node_gets_from_others_is_shared_by_its_ranks():
    step = step_of(WORK, Mesh(1, 1, 16, 1), Choice(), 100, 1, 1, RATES)
    total = 1.5e6 * (2 * 2 + 4)
    found = messages(step)["FSDP"]
    assert found.near == pytest.approx(total * 15 / 16)
    assert found.far == pytest.approx(total / 2 / 8)
    # Of four replicas that are four ranks apart, a node has two.
    apart = messages(step_of(WORK, Mesh(4, 1, 1, 4), Choice(), 100, 1, 1, RATES))["replicas"]
    assert apart.far == pytest.approx(2 * 4 * 1.5e6 / 4 / 2 / 2)


def test_copies_to_the_host():
    step = step_of(WORK, ALONE, Choice("host", True), 100, 1, 1, RATES)
    moved = 2 * 100 * 512 * 2 + 100 * 2 * 8 * (64 * 2 + 4)
    assert messages(step)["host"].host == pytest.approx(2 * moved)
    slow = RATES._replace(host=1e5)
    computing = sum(step.parts[name] for name in ("matrix products", "attention", "element-wise work"))
    shown = step_of(WORK, ALONE, Choice("host", True), 100, 1, 1, slow).parts["copies to the host"]
    assert shown == pytest.approx(2 * moved / 1e5 - computing)


@pytest.mark.parametrize(
    "trained, woken, forward, backward", [(True, False, 2, 2), (False, True, 2, 1), (False, False, 1, 0)]
)
def test_a_tower(trained, woken, forward, backward):
    tower = TowerFacts(TowerSizes(32, 64, 3), 1000, merge=4, item=16, levels=1, trained=trained, woken=woken)
    work = WORK._replace(tower=tower)
    step, text = (step_of(work, Mesh(1, 2, 2, 1), Choice(), 100, 1, 3, RATES, images) for images in (40, 0))
    matrices, pairs = 160 * 3 * 4 * 32 * (2 * 32 + 64), 160 * 3 * 4 * 32 * 16
    numbers = 160 * 3 * (16 * 32 + 4 * 64) * 2
    graph = trained or woken
    sent = 2 * 40 / 2 * 512 * 2 * (1 + graph) / 2  # half of a rank's features, and of their gradients
    seconds = (forward + backward) * matrices / 2e9 + forward * pairs / 1e9 + graph * 2.5 * pairs / 5e8
    seconds += (forward + 2 * graph) * numbers / 1e9
    assert step.parts["vision tower"] == pytest.approx(3 * (seconds / 2 + sent / 1e8))
    assert text.parts["vision tower"] == 0
    assert messages(step)["towers"].near == pytest.approx(3 * sent)
    passes = 3 if trained else 1 + woken
    assert step.flops - text.flops == pytest.approx(3 * passes * (matrices + pairs))


def test_short_steps_wait_for_launches():
    step = step_of(WORK, ALONE, Choice(), 1, 1, 1, RATES)
    fast = RATES._replace(machine=Machine(*[1e18] * 6, 0.0, 0.0, 0.0, 8))
    assert step.parts["waiting for launches"] == 0
    waited = step_of(WORK, ALONE, Choice(), 1, 1, 2, fast)
    assert waited.parts["waiting for launches"] == pytest.approx(2 * 2 * 2e-3)
