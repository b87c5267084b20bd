"""Advice on a job that does not fit."""

from dataclasses import replace

import pytest
import torch

from hf_context_parallel.memory.advice import TILE, advice, by_size, parts_with
from hf_context_parallel.memory.facts import ModelFacts
from hf_context_parallel.memory.job import Job
from hf_context_parallel.memory.parts import parts_of

FACTS = ModelFacts(
    layers=32,
    hidden=4096,
    intermediate=14336,
    heads=32,
    key_heads=8,
    query_dim=128,
    value_dim=128,
    vocabulary=128256,
    parameters=8_030_261_248,
    layer_parameters=218_112_000,
    head_parameters=525_336_576,
)
JOB = Job(FACTS, 65536, cp=2, fsdp=4)


def test_parts_with_weights_of_another_dtype():
    narrow, wide = parts_of(JOB), parts_of(replace(JOB, dtype=torch.float32))
    found = parts_with(JOB, torch.float32)
    assert parts_with(JOB, torch.bfloat16) == narrow
    for name, phase in found.phases.items():
        assert (phase.weights, phase.gradients, phase.optimizer) == (
            wide.phases[name].weights,
            wide.phases[name].gradients,
            wide.phases[name].optimizer,
        )
        assert (phase.layer, phase.attention) == (narrow.phases[name].layer, narrow.phases[name].attention)


def test_the_largest_part_comes_first():
    found = by_size(parts_of(JOB))
    assert sum(size for _, size in found) == pytest.approx(parts_of(JOB).total)
    assert found == sorted(found, key=lambda part: -part[1])


def test_advice_names_the_largest_part_and_what_helps_most_first():
    text = advice(JOB, torch.bfloat16, 4).splitlines()
    (largest, size), *_ = by_size(parts_of(JOB))
    assert f"{parts_of(JOB).total / 2**30:.1f} GiB on a rank" in text[0]
    assert f"{largest}, {size / 2**30:.1f} GiB." in text[0]
    changes = [line.split(" with ") for line in text[1:-1]]
    sizes = [float(size.removesuffix(" GiB")) for size, _ in changes]
    assert sizes == sorted(sizes) and sizes[-1] < parts_of(JOB).total / 2**30
    assert {words for _, words in changes} == {
        "gradient_checkpointing_kwargs={'offload': True}",
        "tile_tokens=2048",
        "context_parallel.size=4",
    }
    assert text[-1] == "`hf-context-parallel plan` lists what fits."


@pytest.mark.parametrize(
    "changes, ranks, words",
    [
        ({"attention_checkpoints": "device"}, 4, {"attention_checkpoints='off'", "attention_checkpoints='host'"}),
        ({"checkpointing": False}, 4, {"gradient_checkpointing=True"}),
        ({"fsdp": 1, "ddp": True}, 4, {"FSDP2 over the 4 data ranks"}),
    ],
)
def test_what_is_proposed(changes, ranks, words):
    text = advice(replace(JOB, **changes), torch.bfloat16, ranks)
    assert all(f" GiB with {word}" in text for word in words)


def test_what_does_not_help_is_not_proposed():
    job = replace(JOB, cp=4, offload=True, attention_checkpoints="off", tile_tokens=TILE)
    text = advice(job, torch.bfloat16, 4)
    assert " GiB with " not in text
