"""Bytes of a rank, beside sums made by hand for a tiny Llama."""

from dataclasses import replace

import pytest
import torch

from hf_context_parallel.attention.peak_memory import peak_of_backward
from hf_context_parallel.attention.prepared import LONG
from hf_context_parallel.memory.facts import ModelFacts
from hf_context_parallel.memory.job import Job
from hf_context_parallel.memory.parts import OF_TILE, Phase, parts_of

T, H, INNER, V, L = 1000, 64, 96, 50, 5
FACTS = ModelFacts(
    layers=L,
    hidden=H,
    intermediate=INNER,
    heads=4,
    key_heads=2,
    query_dim=16,
    value_dim=16,
    vocabulary=V,
    parameters=200_000,
    layer_parameters=30_000,
    head_parameters=H * V,
)
JOB = Job(FACTS, T, dtype=torch.float32, sharded=True)
QUERY = VALUE = T * 64 * 4
KEYS = T * 64 * 4
LSE = T * 4 * 4
HIDDEN = T * H * 4
COS = 2 * T * 16 * 4


def test_what_is_held_in_all_phases():
    parts = parts_of(JOB)
    assert {(phase.weights, phase.optimizer) for phase in parts.phases.values()} == {(800_000, 1_600_000)}
    step = parts.phases["optimizer"]
    assert step == Phase(weights=800_000, gradients=800_000, optimizer=1_600_000)
    assert parts.total == max(phase.total for phase in parts.phases.values()) == parts.at_peak.total
    assert parts_of(replace(JOB, optimizer="sgd")).phases["optimizer"].total == 1_600_000
    assert parts_of(replace(JOB, ddp=True)).phases["optimizer"].gradients == 1_600_000


def test_quantised_weights():
    facts = replace(FACTS, lora_parameters=100, quantized_parameters=100_000, quantized_bits=4.5, dequantized=20_000)
    assert parts_of(replace(JOB, facts=facts)).at_peak.weights == 100_000 * 4 + 100_000 * 4.5 / 8 + 20_000 * 4


def test_gradients_come_with_backward():
    parts = parts_of(JOB)
    by_phase = {name: phase.gradients for name, phase in parts.phases.items()}
    assert by_phase["loss"] == 0
    assert by_phase["mlp of the last layer"] == H * V * 4
    assert by_phase["mlp of the first layer"] == 800_000
    assert parts_of(replace(JOB, accumulates=True)).phases["loss"].gradients == 800_000


def test_checkpoints():
    phases = parts_of(JOB).phases
    assert phases["mlp of the last layer"].checkpoints == L * HIDDEN + COS
    assert phases["mlp of the first layer"].checkpoints == HIDDEN + COS
    saved = 6 * HIDDEN + QUERY + KEYS + VALUE + LSE + 4 * T * INNER * 4
    assert parts_of(replace(JOB, checkpointing=False)).phases["loss"].checkpoints == L * saved + COS


def test_kept_attention():
    assert parts_of(JOB).at_peak.attention == 0
    kept = parts_of(replace(JOB, attention_checkpoints="device"))
    assert kept.phases["loss"].attention == L * (VALUE + LSE)
    host = parts_of(replace(JOB, attention_checkpoints="host", offload=True))
    assert host.phases["loss"].attention == 2 * (VALUE + LSE)
    assert host.phases["loss"].checkpoints == 2 * HIDDEN + COS
    assert host.host == L * (VALUE + LSE + HIDDEN)
    linear = parts_of(replace(JOB, facts=replace(FACTS, linear_layers=L), attention_checkpoints="device"))
    assert linear.phases["loss"].attention == 0


def test_a_layer():
    phase = parts_of(JOB).phases["mlp of the last layer"]
    assert phase.layer == 6 * HIDDEN + QUERY + KEYS + VALUE + LSE + 6 * T * INNER * 4
    tiles = parts_of(replace(JOB, tile_tokens=100)).phases["mlp of the last layer"]
    # Norms hold two tensors less, and four are there in pieces and joined.
    assert phase.layer - tiles.layer == 6 * 900 * INNER * 4 + 2 * HIDDEN - 4 * HIDDEN
    adapters = parts_of(replace(JOB, facts=replace(FACTS, lora_parameters=1000)))
    assert phase.layer - adapters.phases["mlp of the last layer"].layer == 2 * HIDDEN


def test_without_checkpointing_a_layer_adds_gradients_alone():
    whole = parts_of(replace(JOB, checkpointing=False))
    assert whole.phases["mlp of the last layer"].layer == HIDDEN + 2 * T * INNER * 4


def test_half_precision_keeps_the_inputs_of_norms_in_float32():
    half, layer = HIDDEN / 2, parts_of(replace(JOB, dtype=torch.bfloat16)).phases["mlp of the last layer"].layer
    assert layer == 2 * (HIDDEN + 2 * half) + half + (QUERY + KEYS + VALUE) / 2 + LSE + 6 * T * INNER * 2


def test_buffers_of_the_cpu_are_there_in_all_phases():
    cpu = replace(JOB, tokens=2 * T, cp=2, kernel="cpu")
    ring, alone = parts_of(cpu), parts_of(replace(cpu, tokens=T, cp=1, sharded=False))
    copies = 3 * QUERY + 2 * KEYS
    assert ring.phases["loss"].layer == copies
    assert ring.phases["mlp of the last layer"].layer == alone.phases["mlp of the last layer"].layer + copies
    assert len({phase.messages for phase in list(ring.phases.values())[:-1]}) == 1
    on_gpu = parts_of(replace(cpu, kernel="")).phases["attention of the first layer"]
    assert ring.phases["loss"].messages == on_gpu.messages + 2 * KEYS


def test_buffers_of_the_cpu_are_gone_between_layers_of_long_rows():
    ring = parts_of(replace(JOB, tokens=2 * LONG, cp=4, kernel="cpu"))
    alone = parts_of(replace(JOB, tokens=LONG // 2, kernel="cpu", sharded=False))
    for name in ("loss", "mlp of the last layer", "mlp of the first layer"):
        assert ring.phases[name] == alone.phases[name]
    assert ring.phases["attention of the last layer"].messages > 0


def test_messages():
    assert all(phase.messages == 0 for phase in parts_of(JOB).phases.values())
    ring = parts_of(replace(JOB, tokens=4 * T, cp=4)).phases["attention of the last layer"]
    alone = parts_of(JOB).phases["attention of the last layer"]
    assert ring.layer == alone.layer

    def of_ring(tokens: int, owners: int) -> float:
        held, arriving = (1 + 2 * owners) * tokens, owners * tokens
        own = peak_of_backward(JOB.shape, "torch", tokens, tokens, 1, tokens, 0, 0)
        one_call = own + (KEYS - QUERY) * tokens / T  # which sums nothing
        return peak_of_backward(JOB.shape, "torch", tokens, tokens, 1, held, held, arriving) - one_call

    assert ring.messages == of_ring(T, 3)
    long = replace(JOB, tokens=2**24, cp=4, head_groups=1)
    wide = parts_of(long).phases["attention of the last layer"].messages
    assert wide == of_ring(2**22, 1)  # more owners a step would take more than 1 GiB
    gathered = parts_of(replace(JOB, tokens=4 * T, cp=4, comm_type="all_gather"))
    assert gathered.phases["attention of the last layer"].messages > ring.messages


def test_groups_of_heads():
    long, name = replace(JOB, tokens=2**24, cp=4), "attention of the last layer"
    whole, grouped = (parts_of(replace(long, head_groups=groups)).phases[name] for groups in (1, 2))
    tokens, numbers = 2**22, 4 * 16 + 2 * 32
    one = JOB.shape._replace(heads=2, key_heads=1)
    of_group = peak_of_backward(one, "torch", tokens, tokens, 1, 3 * tokens, 3 * tokens, tokens)
    # The gradients of all heads join what a group needs.
    working = peak_of_backward(JOB.shape, "torch", tokens, tokens, 1, 3 * tokens, 3 * tokens, tokens)
    assert whole.total - grouped.total == working - of_group - tokens * numbers * 4
    assert parts_of(long).phases[name] == grouped  # which is chosen


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather"])
def test_ranks_go_as_much_further_as_there_are_of_them(comm_type, tp):
    """Check that, of a long sequence, attention is at no peak of a step, whatever else is left out."""
    facts = replace(FACTS, heads=32, key_heads=8, query_dim=128, value_dim=128, hidden=4096, intermediate=14_336)
    for tile, place in ((None, "off"), (None, "device"), (4096, "device"), (4096, "host")):
        job = Job(facts, 2**18, tp=tp, sharded=True, tile_tokens=tile, attention_checkpoints=place)
        job = replace(job, comm_type=comm_type, offload=place == "host")
        alone = parts_of(job)
        for cp in (2, 4, 8):
            shared = parts_of(replace(job, tokens=cp * job.tokens, cp=cp))
            # All keys of a group of heads are there at once in all_gather, and are more with each rank.
            assert shared.total <= 1.05 * alone.total if comm_type == "all_gather" else shared.total == alone.total


@pytest.mark.parametrize(
    "place, more",
    [
        ("off", VALUE),  # the gradient of the output, exchanged
        ("device", VALUE + QUERY + KEYS + VALUE),  # all that backward needs is there twice
    ],
)
def test_exchanged_heads(place, more):
    one = replace(JOB, kernel="", attention_checkpoints=place)
    alone, ulysses = parts_of(one), parts_of(replace(one, tokens=2 * T, cp=2, comm_type="a2a"))
    name = "attention of the last layer"
    assert ulysses.phases[name].total - alone.phases[name].total == ulysses.phases[name].messages == more


def test_one_rank_with_the_attention_of_transformers():
    alone = parts_of(replace(JOB, sharded=False, attention_checkpoints="off"))
    assert {phase.attention for phase in alone.phases.values()} == {0}
    kept = parts_of(replace(JOB, sharded=False, attention_checkpoints="device"))
    assert max(phase.attention for phase in kept.phases.values()) > 0  # which that attention cannot do
    backward = "attention of the last layer"
    sharded = parts_of(JOB).phases[backward].layer
    assert sharded - alone.phases[backward].layer == KEYS  # gradients of keys and of values, joined


def test_loss():
    loss = parts_of(replace(JOB, loss_chunk_tokens=100)).phases["loss"].loss
    norm = 7 * HIDDEN + H * V * 4  # its backward, with the gradient of the head
    assert loss == max(4 * HIDDEN + max(12 * 100 * V + 0.9 * HIDDEN + 2 * H * V * 4, 2 * HIDDEN + H * V * 4), norm)
    whole = parts_of(JOB).phases["loss"].loss
    assert whole == max(4 * HIDDEN + 12 * T * V + H * V * 4, norm)
    tiles = parts_of(replace(JOB, tile_tokens=100)).phases["loss"].loss
    assert tiles == 4 * HIDDEN + 12 * T * V + H * V * 4
    on_cpu = [
        parts_of(replace(JOB, kernel="cpu", tile_tokens=tile)).phases["loss"].checkpoints for tile in (None, 100)
    ]
    assert on_cpu[1] - on_cpu[0] == L * 3 * 10 * OF_TILE


def test_ranks_share():
    parts = parts_of(replace(JOB, tokens=2 * T, cp=2, fsdp=4))
    assert parts.phases["optimizer"].gradients == 200_000
    assert parts.phases["optimizer"].weights == 200_000 + 4 * (2 * 30_000 + 2 * H * V)
    assert parts.phases["mlp of the first layer"].gradients == 200_000 + 4 * 30_000
    tensor = parts_of(replace(JOB, tp=2)).phases["mlp of the last layer"]
    assert tensor.weights == 400_000
    assert tensor.layer == 6 * HIDDEN + (QUERY + KEYS + VALUE + LSE) / 2 + 3 * T * INNER * 4


def test_names_are_checked():
    with pytest.raises(ValueError, match="attention_checkpoints='on' is not one of off, device, host"):
        replace(JOB, attention_checkpoints="on")
