"""Tests of kernels, compared with dense attention by tile, and of their refusals."""

import re

import pytest
import torch

from hf_context_parallel.attention.kernels import cpu, flash_attn_4, reference
from hf_context_parallel.attention.kernels.registry import KERNELS, CpuKernel, ReferenceKernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Band, Segments
from tests.helpers.kernels import CALLS, SCALE, SHAPES, SOFTCAP, TOLERANCE, check
from tests.helpers.simulated import LargestTensor

any_machines = pytest.mark.parametrize("kernel", [CpuKernel(), ReferenceKernel()], ids=lambda kernel: kernel.name)
capped = pytest.mark.parametrize("softcap", [None, SOFTCAP], ids=["", "softcap"])


@pytest.mark.parametrize("dtype", TOLERANCE)
@any_machines
@capped
@pytest.mark.parametrize("calls", CALLS)
def test_calls(calls, softcap, kernel, dtype):
    check(kernel, calls, "grouped", dtype, softcap)


@pytest.mark.parametrize("dtype", TOLERANCE)
@any_machines
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, kernel, dtype):
    check(kernel, "queries that read in several calls", shape, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@any_machines
@capped
def test_shapes_of_windows(shape, softcap, kernel):
    check(kernel, "queries that read in several windows", shape, torch.float64, softcap)


@pytest.mark.parametrize("most", [1, 3])
@any_machines
@capped
@pytest.mark.parametrize("calls", CALLS)
def test_calls_in_blocks(calls, softcap, kernel, most, monkeypatch):
    """Compute calls in blocks of one query, and of a few."""
    monkeypatch.setattr(cpu, "MOST_QUERIES", most)
    monkeypatch.setattr(reference, "MOST_SCORES", most if most == 1 else most * SHAPES["grouped"][0] * 7)
    check(kernel, calls, "grouped", torch.float64, softcap)


SCORES = {
    "nothing else": Scores(SCALE),
    "softcap": Scores(SCALE, SOFTCAP),
    "dropout": Scores(SCALE, dropout_p=0.1, seed=5),
}


@pytest.mark.parametrize(
    "kernel, scores, band",
    [
        ("cpu", "nothing else", Band(99, 0)),
        ("cpu", "nothing else", Band(20, 30)),
        ("cpu", "softcap", CAUSAL),
        ("cpu", "softcap", Band(99, 0)),
        ("cpu", "dropout", CAUSAL),
        ("reference", "nothing else", FULL),
    ],
)
def test_no_tensor_grows_with_the_square_of_the_tokens(kernel, scores, band):
    def largest(tokens):
        whole = torch.randn(4, tokens, 2, 4, generator=torch.Generator().manual_seed(0))
        query, key, value, grad = whole
        call = Segments(((0, tokens),), ((0, tokens),), band)
        with LargestTensor() as made:
            arguments = query, key, value, *KERNELS[kernel]().forward(query, key, value, call, SCORES[scores])
            KERNELS[kernel]().backward(grad, *arguments, call, SCORES[scores])
        return made.elements

    shorter, longer = largest(2048), largest(4096)
    assert 4096 * 2 * 4 <= longer <= 2 * shorter
    assert longer <= reference.MOST_SCORES < 4096**2 * 2


CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize("name", ["torch", "flash_attn", "flash_attn_3", "flash_attn_4"])
@pytest.mark.parametrize(
    "device, dtype, dims, refusal",
    [
        (CUDA, torch.bfloat16, (128, 128), None),
        (CUDA, torch.float16, (256, 3), None),
        (CUDA, torch.float32, (64, 64), "not torch.float32. Train with bf16=True .*dtype=torch.bfloat16.*'reference'"),
        (CUDA, torch.float64, (64, 64), "not torch.float64"),
        (CUDA, torch.bfloat16, (257, 64), "head dims up to 256, not 257. Use kernel='reference'"),
        (CUDA, torch.bfloat16, (64, 512), "head dims up to 256, not 512"),
        (CPU, torch.bfloat16, (64, 64), "runs on CUDA, but the tensors are on cpu. Use kernel='auto'"),
    ],
)
def test_flash_kernels_refuse(name, device, dtype, dims, refusal):
    found = KERNELS[name]().refusal(device, dtype, *dims, Scores(SCALE))
    assert found is None if refusal is None else re.search(refusal, found)


@pytest.mark.parametrize(
    "name, scores, refusal",
    [
        (
            "torch",
            "softcap",
            r"FlashAttention-2 of PyTorch, has no softcap \(1.5\). Install flash-attn",
        ),
        ("flash_attn", "softcap", None),
        ("flash_attn_3", "softcap", None),
        ("flash_attn_3", "dropout", "a dropout of 0.1 dropped"),
        ("torch", "dropout", "a dropout of 0.1 dropped. Set attention dropout to 0, or use kernel='reference'"),
        ("flash_attn", "dropout", "a dropout of 0.1 dropped. Set attention dropout to 0, or use kernel='reference'"),
        ("reference", "softcap", None),
        ("reference", "dropout", None),
    ],
)
def test_scores_that_kernels_refuse(name, scores, refusal):
    found = KERNELS[name]().refusal(CUDA, torch.bfloat16, 64, 64, SCORES[scores])
    assert found is None if refusal is None else re.search(refusal, found)


@pytest.fixture
def device_of(monkeypatch):
    """Fixture that gives the CUDA device a compute capability."""

    def has(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a device")

    return has


@pytest.mark.parametrize(
    "name, capabilities, needs",
    [
        ("torch", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], r"8.0 \(Ampere\) or later"),
        ("flash_attn_3", [(9, 0)], r"9.0 \(Hopper\)"),
        ("flash_attn_4", [(9, 0), (10, 0), (10, 3)], r"9.0 \(Hopper\) or 10.x \(Blackwell\)"),
    ],
)
def test_flash_kernels_refuse_devices(name, capabilities, needs, device_of):
    for capability in [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]:
        device_of(*capability)
        found = KERNELS[name]().refusal(CUDA, torch.bfloat16, 64, 64, Scores(SCALE))
        said = f"needs compute capability {needs}, and a device has {capability[0]}.{capability[1]}. Use kernel='auto'"
        assert found is None if capability in capabilities else re.search(said, found)


def test_flash_attention_3_is_not_deterministic_for_wide_heads():
    scores = Scores(SCALE, deterministic=True)
    assert KERNELS["flash_attn_3"]().refusal(CUDA, torch.bfloat16, 192, 128, scores) is None
    assert "head dims above 192, and this one is 256. Use kernel='torch'" in KERNELS["flash_attn_3"]().refusal(
        CUDA, torch.bfloat16, 64, 256, scores
    )


def test_flash_attention_4_names_the_versions_and_devices_without_a_softcap(device_of, monkeypatch):
    scores, kernel = Scores(SCALE, SOFTCAP), KERNELS["flash_attn_4"]()
    monkeypatch.setattr(flash_attn_4, "version", lambda name: "4.0.0b23")
    said = r"flash-attn-4 4.0.0b23 has no backward with a softcap \(1.5\). Run pip install 'flash-attn-4>=4.0.0b24'"
    assert re.search(said, kernel.refusal(CUDA, torch.bfloat16, 64, 64, scores))
    monkeypatch.setattr(flash_attn_4, "version", lambda name: "4.0.0b24")
    device_of(9, 0)
    assert kernel.refusal(CUDA, torch.bfloat16, 256, 256, scores) is None
    device_of(10, 0)
    assert kernel.refusal(CUDA, torch.bfloat16, 128, 128, scores) is None
    assert "has no softcap (1.5) for head dims 160 and 160 on Blackwell" in kernel.refusal(
        CUDA, torch.bfloat16, 160, 160, scores
    )


@pytest.mark.parametrize(
    "name, device, dtype, refusal",
    [
        ("cpu", CPU, torch.float64, None),
        ("cpu", CPU, torch.float16, None),
        ("cpu", CUDA, torch.float32, "runs on the CPU, but the tensors are on cuda:0. Use kernel='auto'"),
        ("cpu", CPU, torch.int64, "not torch.int64"),
        ("reference", CUDA, torch.float32, None),
        ("reference", CPU, torch.int64, "it takes no torch.int64. Use a floating-point dtype"),
    ],
)
def test_kernels_of_any_machine_refuse(name, device, dtype, refusal):
    found = KERNELS[name]().refusal(device, dtype, 300, 64, Scores(SCALE))
    assert found is None if refusal is None else re.search(refusal, found)
