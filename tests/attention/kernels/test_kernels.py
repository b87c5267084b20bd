"""Tests of kernels, compared with dense attention by tile, of their choice, and of their refusals."""

import importlib.util
import logging
import re
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_context_parallel.attention.kernels import cpu, reference
from hf_context_parallel.attention.kernels.base import blocks
from hf_context_parallel.attention.kernels.registry import (
    KERNELS,
    CpuKernel,
    ReferenceKernel,
    TorchKernel,
    check_kernel,
    choose_kernel,
)
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Band, Segments
from tests.helpers.kernels import CALLS, SCALE, SHAPES, SOFTCAP, TOLERANCE, check, limits, tensors
from tests.helpers.simulated import LargestTensor, in_band

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


@given(st.integers(1, 12), st.integers(1, 12), st.builds(Band, limits, limits), st.integers(1, 13))
def test_blocks_make_up_a_band(queries, keys, band, most):
    """Check the blocks of a band.

    They have each pair of the band once and no other pair. No query is in two blocks. No mask hides nothing. The first
    and the last key of a block are read.
    """
    expected = in_band(queries, keys, band)
    assume(expected.any(1).all())
    found, next_query = torch.zeros(queries, keys, dtype=torch.int), 0
    for block in blocks(queries, keys, band, most):
        (q0, q1), (k0, k1) = block.query, block.key
        assert q0 == next_query < q1 <= q0 + most and 0 <= k0 < k1 <= keys
        hidden = block.hidden(torch.device("cpu"))
        assert hidden is None or hidden.any()
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.int) if hidden is None else (~hidden).int()
        assert seen[:, 0].any() and seen[:, -1].any()
        found[q0:q1, k0:k1] += seen
        next_query = q1
    assert next_query == queries and found.equal(expected.int())


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


# Tests of the choice of a kernel, and of its refusals.


@pytest.fixture(autouse=True)
def fresh_choice():
    choose_kernel.cache_clear()
    yield
    choose_kernel.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Fixture that sets the software and hardware of the machine. By default there is none."""

    def has(flash_attn=False, cuda=False, flash_in_torch=False):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash_in_torch)
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *args: bool(flash_attn) or None if name == "flash_attn" else find_spec(name, *args),
        )
        package = ModuleType("flash_attn")
        package.__path__ = []
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        interface = "flash_attn.flash_attn_interface"
        monkeypatch.delitem(sys.modules, interface, raising=False)
        if flash_attn is True:
            monkeypatch.setitem(sys.modules, interface, ModuleType(interface))

    has()
    return has


def test_a_missing_kernel_says_how_to_get_it(machine):
    with pytest.raises(ValueError, match=re.escape("pip install 'flash-attn>=2.6,<2.9'")):
        choose_kernel("flash_attn", "cuda")
    with pytest.raises(
        ValueError, match=r"kernel='torch' cannot be used: .*no CUDA device. On the CPU use kernel='cpu'"
    ):
        choose_kernel("torch", "cuda")
    machine(flash_attn=True)
    with pytest.raises(ValueError, match=r"kernel='flash_attn' cannot be used: .*no CUDA device"):
        choose_kernel("flash_attn", "cuda")
    machine(cuda=True)
    with pytest.raises(ValueError, match="Install a CUDA build of PyTorch"):
        choose_kernel("torch", "cuda")


def test_a_flash_attn_that_cannot_be_imported_is_passed_over(machine):
    """Break flash-attn as one built for another PyTorch, or flash-attn-4, whose modules lie in the same package."""
    machine(flash_attn="broken", cuda=True, flash_in_torch=True)
    assert choose_kernel("auto", "cuda").name == "torch"
    with pytest.raises(ValueError, match=r"flash-attn cannot be imported \(No module named.*pip install"):
        choose_kernel("flash_attn", "cuda")


def test_no_kernel_for_a_device_says_why(machine):
    with pytest.raises(
        ValueError, match=r"'flash_attn': .*pip install.*'torch': .*kernel='reference', which runs everywhere"
    ):
        choose_kernel("auto", "cuda")
    with pytest.raises(ValueError, match=r"none for device type 'mps' \(none is known for it\)"):
        choose_kernel("auto", "mps")


@pytest.mark.parametrize("has_flash_attn, chosen", [(True, "flash_attn"), (False, "torch")])
def test_auto_takes_the_best_there_is(machine, has_flash_attn, chosen):
    machine(flash_attn=has_flash_attn, cuda=True, flash_in_torch=True)
    assert choose_kernel("auto", "cuda").name == chosen
    assert choose_kernel("auto", "cpu").name == "cpu"


def test_auto_logs_its_choice_once(machine, caplog):
    with caplog.at_level(logging.INFO, "hf_context_parallel"):
        chosen = [choose_kernel("auto", "cpu") for _ in range(3)]
    assert chosen[0] is chosen[1] is chosen[2]
    assert [record.getMessage() for record in caplog.records] == [
        "context parallelism computes attention with kernel='cpu' on cpu"
    ]
    choose_kernel("reference", "cpu")  # a kernel that is asked for by name is not logged
    assert len(caplog.records) == 1


CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize("name", ["torch", "flash_attn"])
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
        ("torch", "softcap", r"it has no softcap \(1.5\). Install flash-attn, or use kernel='reference'"),
        ("flash_attn", "softcap", None),
        ("torch", "dropout", "a dropout of 0.1 dropped. Set attention dropout to 0, or use kernel='reference'"),
        ("flash_attn", "dropout", "a dropout of 0.1 dropped. Set attention dropout to 0, or use kernel='reference'"),
        ("reference", "softcap", None),
        ("reference", "dropout", None),
    ],
)
def test_scores_that_kernels_refuse(name, scores, refusal):
    found = KERNELS[name]().refusal(CUDA, torch.bfloat16, 64, 64, SCORES[scores])
    assert found is None if refusal is None else re.search(refusal, found)


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


def test_a_refusal_is_an_error_that_names_the_kernel():
    query, _, value, _ = tensors(SHAPES["narrow values"], torch.float32)
    check_kernel(CpuKernel(), query, value, Scores(SCALE, SOFTCAP, 0.1))
    with pytest.raises(ValueError, match=r"kernel='torch' cannot take these tensors: it runs on CUDA"):
        check_kernel(TorchKernel(), query, value, Scores(SCALE))
