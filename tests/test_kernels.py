"""Kernels, held to dense attention tile by tile; the CUDA kernels' adapters, against stand-ins for what they call."""

import importlib.util
import logging
import re
import sys
from functools import cache
from types import ModuleType, SimpleNamespace

import pytest
import torch
from simulated import dense_attention
from torch.utils._python_dispatch import TorchDispatchMode

from hf_context_parallel.attention.merge import merge_
from hf_context_parallel.kernels import (
    KERNELS,
    CpuKernel,
    FlashAttnKernel,
    ReferenceKernel,
    TorchKernel,
    check_kernel,
    choose_kernel,
)
from hf_context_parallel.plan import Segments

SCALE = 0.3
TOKENS = 23
own = ((0, 6), (7, 8), (9, 20))
CALLS = {
    "a tile": [Segments(((0, 7),), ((2, 20),), False)],
    "a causal tile": [Segments(((3, 20),), ((3, 20),), True)],
    "several tiles": [Segments(((0, 5), (6, 7), (9, 20)), ((3, 10), (0, 1), (10, 23)), False)],
    "several causal tiles": [Segments(own, own, True)],
    "neighbours": [Segments(((2, 5), (5, 9)), ((0, 4), (4, 11)), False)],
    "tiles that share keys": [Segments(((0, 4), (4, 9)), ((0, 3), (0, 8)), False)],
    "queries that read in several calls": [
        Segments(own, own, True),
        Segments(own[1:], (own[0], own[1]), False),
        Segments(own[2:], own[:1], False),
    ],
    "single tokens": [Segments(((1, 2), (4, 5)), ((1, 2), (4, 5)), True), Segments(((4, 5),), ((1, 2),), False)],
}
SHAPES = {
    "equal heads": (3, 3, 8, 8),
    "grouped": (6, 2, 16, 16),
    "one key head": (4, 1, 8, 8),
    "narrow values": (4, 2, 12, 5),
    "wide values": (4, 2, 3, 16),
    "two of 8 wide": (2, 2, 40, 24),
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Norm of the error, relative to the norm."""


def tensors(shape, dtype, device="cpu"):
    """Query, key, value and the output's gradient; key and value are views, as the ring's are."""
    heads, key_heads, dim, value_dim = shape
    random = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(TOKENS, *sizes, generator=random, dtype=torch.float64).to(device, dtype)

    key_value = normal(key_heads, dim + value_dim)
    return normal(heads, dim), key_value[..., :dim], key_value[..., dim:], normal(heads, value_dim)


def by_definition(calls, query, key, value, grad):
    """Output, LSE and the gradients of query, key and value, of all that the calls compute, in float64."""
    seen = torch.zeros(1, TOKENS, TOKENS, dtype=torch.bool)
    for call in calls:
        for (q0, q1), (k0, k1) in zip(call.queries, call.keys):
            tile = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            assert not seen[0, q0:q1, k0:k1].any()
            seen[0, q0:q1, k0:k1] = tile.tril() if call.causal else tile
    leaves = [x.double()[None].requires_grad_() for x in (query, key, value)]
    output, lse = dense_attention(*leaves, seen, SCALE)
    output.backward(grad.double()[None])
    return [x[0].detach() for x in (output, lse, *(leaf.grad for leaf in leaves))]


def by_kernel(kernel, calls, query, key, value, grad):
    """The same from a kernel: its parts merged, and its shares of the gradients, given the output and LSE over all."""
    exact = torch.promote_types(query.dtype, torch.float32)
    output, lse = torch.zeros_like(grad, dtype=exact), torch.full(query.shape[:2], float("-inf"), dtype=exact)
    for call in calls:
        part, part_lse = kernel.forward(query, key, value, call, SCALE)
        assert part.dtype in (query.dtype, exact) and part_lse.dtype == exact
        merge_(output, lse, call.query_runs, part, part_lse)
    grads = [torch.zeros_like(x, dtype=exact) for x in (query, key, value)]
    for call in calls:
        shares = kernel.backward(grad, query, key, value, output.to(query.dtype), lse, call, SCALE)
        for total, share, ranges in zip(grads, shares, (call.queries, call.keys, call.keys)):
            index = torch.cat([torch.arange(*interval) for interval in ranges])
            assert share.shape == (len(index), *total.shape[1:])
            total.index_add_(0, index, share.to(exact))
    return output, lse, *grads


def check(kernel, calls, shape, dtype):
    whole = tensors(SHAPES[shape], dtype)
    names = ("output", "lse", "dq", "dk", "dv")
    for name, got, expected in zip(
        names, by_kernel(kernel, CALLS[calls], *whole), by_definition(CALLS[calls], *whole)
    ):
        read = expected.isfinite()
        assert got.isfinite().equal(read), name
        error = (got.double() - expected)[read].norm() / expected[read].norm()
        assert error <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", [CpuKernel(), ReferenceKernel()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("calls", CALLS)
def test_calls(calls, kernel, dtype):
    check(kernel, calls, "grouped", dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", [CpuKernel(), ReferenceKernel()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, kernel, dtype):
    check(kernel, "queries that read in several calls", shape, dtype)


# The adapters of CUDA kernels. What they call runs on no CPU, so stand-ins with its signatures take its place: they
# check what they are given and compute it with the reference kernel.


def packed(query, key, value, cu_queries, cu_keys, max_queries, max_keys, dropout, causal):
    """The segments of a call, after a check of all that FlashAttention wants of it."""
    assert dropout == 0
    assert query.dtype == key.dtype == value.dtype in (torch.bfloat16, torch.float16)
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    assert key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    assert all(tensor.dim() == 3 and tensor.stride(-1) == 1 for tensor in (query, key, value))
    ranges = []
    for rows, cumulative, longest in ((query, cu_queries, max_queries), (key, cu_keys, max_keys)):
        assert cumulative.dtype == torch.int32 and cumulative.is_contiguous() and cumulative.device == rows.device
        edges = cumulative.tolist()
        ranges.append(tuple(zip(edges, edges[1:])))
        assert edges[0] == 0 and edges[-1] == len(rows)
        assert min(stop - start for start, stop in ranges[-1]) > 0
        assert max(stop - start for start, stop in ranges[-1]) == longest
    assert len(ranges[0]) == len(ranges[1])
    assert not causal or ranges[0] == ranges[1]  # else its causal masks are aligned to the bottom right
    return Segments(*ranges, causal)


def packed_forward(query, key, value, cu_queries, cu_keys, max_queries, max_keys, dropout, scale, causal):
    """Output and LSE `[H, Q]`."""
    segments = packed(query, key, value, cu_queries, cu_keys, max_queries, max_keys, dropout, causal)
    output, lse = ReferenceKernel().forward(query, key, value, segments, scale)
    return output, lse.T.contiguous()


def packed_backward(grad, query, key, value, output, lse, cu_queries, cu_keys, max_q, max_k, dropout, scale, causal):
    """The gradients of query, key and value."""
    segments = packed(query, key, value, cu_queries, cu_keys, max_q, max_k, dropout, causal)
    for tensor in (grad, output):
        assert (tensor.shape, tensor.dtype, tensor.stride(-1)) == (query.shape, query.dtype, 1)
    assert lse.shape == (query.shape[1], len(query)) and lse.dtype == torch.float32 and lse.is_contiguous()
    grads = ReferenceKernel().backward(grad, query, key, value, output, lse.T, segments, scale)
    return [share.to(query.dtype) for share in grads]


class StandInForAten(TorchDispatchMode):
    """PyTorch's own operators: their schemas are checked before a call comes here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._flash_attention_forward.default:
            return self.forward(*args, **kwargs)
        if func is torch.ops.aten._flash_attention_backward.default:
            return self.backward(*args, **kwargs)
        return func(*args, **(kwargs or {}))

    def forward(self, query, key, value, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
        assert not debug
        output, lse = packed_forward(query, key, value, cu_q, cu_k, max_q, max_k, dropout, scale, causal)
        return output, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(
        self, grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale
    ):
        assert state.dtype == unused.dtype == torch.uint64
        return packed_backward(grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, dropout, scale, causal)


def flash_attn_2_6():
    """The interface of flash-attn 2.6.0. Later 2.6 have defaults for all that comes after `causal` in the forward."""

    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_softmax,
        block_table,
    ):
        assert (window_size, softcap, alibi_slopes, return_softmax, block_table) == ((-1, -1), 0, None, False, None)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, softmax_lse = packed_forward(q, k, v, *lengths, dropout_p, softmax_scale, causal)
        return out, q, k, v, out, softmax_lse, None, torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (window_size, softcap, alibi_slopes, deterministic) == ((-1, -1), 0, None, False)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        grads = packed_backward(dout, q, k, v, out, softmax_lse, *lengths, dropout_p, softmax_scale, causal)
        for grad, computed in zip((dq, dk, dv), grads):
            grad.copy_(computed)
        return dq, dk, dv, torch.empty(0)

    return _flash_attn_varlen_forward, _flash_attn_varlen_backward


@cache
def flash_attn_since_2_7(minor, more=""):
    """The interface of flash-attn 2.7 and 2.8: operators of PyTorch, with a typed schema and no Python signature."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, causal, left=-1, right=-1, softcap=0.0, *unused):
        assert (left, right, softcap) == (-1, -1, 0) and not any(unused)
        out, lse = packed_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, causal)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout,
        scale,
        causal,
        left,
        right,
        softcap,
        *rest,
    ):
        assert (left, right, softcap) == (-1, -1, 0) and not any(rest)
        grads = packed_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, scale, causal)
        for grad, computed in zip((dq, dk, dv), grads):
            grad.copy_(computed)
        return torch.empty(0)

    lengths = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
    options = f"{lengths}, float dropout_p, float softmax_scale, bool causal"
    forward_schema = (
        f"(Tensor q, Tensor k, Tensor v, {options}, SymInt window_size_left=-1, SymInt window_size_right=-1, "
        "float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, "
        f"Tensor? leftpad_k=None, Tensor? seqused_k=None{more}) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    backward_schema = (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq, "
        f"Tensor(dk!)? dk, Tensor(dv!)? dv, {options}, SymInt window_size_left, SymInt window_size_right, "
        f"float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None{more}) -> Tensor"
    )
    name = f"flash_attn_2_{minor}::_flash_attn_varlen"
    return (
        torch.library.custom_op(f"{name}_forward", forward, mutates_args=(), schema=forward_schema),
        torch.library.custom_op(f"{name}_backward", backward, mutates_args=("dq", "dk", "dv"), schema=backward_schema),
    )


FLASH_ATTN = {
    "flash_attn 2.6": flash_attn_2_6,
    "flash_attn 2.7": lambda: flash_attn_since_2_7(7),
    "flash_attn 2.8": lambda: flash_attn_since_2_7(8, more=", bool zero_tensors=False"),
}


@pytest.fixture(params=["torch", *FLASH_ATTN])
def adapter(request, monkeypatch):
    """A CUDA kernel, with a stand-in for what it calls."""
    if request.param == "torch":
        with StandInForAten():
            yield TorchKernel()
        return
    forward, backward = FLASH_ATTN[request.param]()
    package = ModuleType("flash_attn")
    package.flash_attn_interface = SimpleNamespace(
        _flash_attn_varlen_forward=forward, _flash_attn_varlen_backward=backward
    )
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    yield FlashAttnKernel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calls", CALLS)
def test_adapters_calls(adapter, calls, dtype):
    check(adapter, calls, "grouped", dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_shapes(adapter, shape):
    check(adapter, "queries that read in several calls", shape, torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("calls", ["several tiles", "several causal tiles"])
def test_pytorchs_own_operators_take_the_call(calls, shape):
    """By their schemas and by what PyTorch says of their results, on the device that computes nothing."""
    query, key, value, grad = tensors(SHAPES[shape], torch.bfloat16, "meta")
    (call,) = CALLS[calls]
    rows, keys = (sum(stop - start for start, stop in ranges) for ranges in (call.queries, call.keys))
    output, lse = TorchKernel().forward(query, key, value, call, SCALE)
    assert (output.shape, output.dtype) == ((rows, *grad.shape[1:]), query.dtype)
    assert (lse.shape, lse.dtype) == ((rows, query.shape[1]), torch.float32)
    lse = torch.empty(query.shape[:2], device="meta")
    shares = TorchKernel().backward(grad, query, key, value, torch.empty_like(grad), lse, call, SCALE)
    assert [share.shape for share in shares] == [
        (rows, *query.shape[1:]),
        (keys, *key.shape[1:]),
        (keys, *value.shape[1:]),
    ]


# Which kernel is used, and what it refuses.


@pytest.fixture(autouse=True)
def fresh_choice():
    choose_kernel.cache_clear()
    yield
    choose_kernel.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Says what is on the machine: nothing, unless told otherwise."""

    def has(flash_attn=False, cuda=False, flash_in_torch=False):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash_in_torch)
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *args: flash_attn or None if name == "flash_attn" else find_spec(name, *args),
        )

    has()
    return has


def test_a_missing_kernel_says_how_to_get_it(machine):
    with pytest.raises(ValueError, match=re.escape("pip install 'hf-context-parallel[flash]'")):
        choose_kernel("flash_attn", "cuda")
    with pytest.raises(
        ValueError, match=r"kernel='torch' cannot be used: .*no CUDA device; on the CPU use kernel='cpu'"
    ):
        choose_kernel("torch", "cuda")
    machine(flash_attn=True)
    with pytest.raises(ValueError, match=r"kernel='flash_attn' cannot be used: .*no CUDA device"):
        choose_kernel("flash_attn", "cuda")
    machine(cuda=True)
    with pytest.raises(ValueError, match="install a CUDA build of PyTorch"):
        choose_kernel("torch", "cuda")


def test_no_kernel_for_a_device_says_why(machine):
    with pytest.raises(
        ValueError, match=r"'flash_attn': .*pip install.*'torch': .*kernel='reference' runs everywhere"
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
    choose_kernel("reference", "cpu")  # asked for by name: no need to say so
    assert len(caplog.records) == 1


CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize("name", ["torch", "flash_attn"])
@pytest.mark.parametrize(
    "device, dtype, dims, refusal",
    [
        (CUDA, torch.bfloat16, (128, 128), None),
        (CUDA, torch.float16, (256, 3), None),
        (CUDA, torch.float32, (64, 64), "not torch.float32; train with bf16=True .*dtype=torch.bfloat16.*'reference'"),
        (CUDA, torch.float64, (64, 64), "not torch.float64"),
        (CUDA, torch.bfloat16, (257, 64), "head dims up to 256, not 257; use kernel='reference'"),
        (CUDA, torch.bfloat16, (64, 512), "head dims up to 256, not 512"),
        (CPU, torch.bfloat16, (64, 64), "runs on CUDA and the tensors are on cpu; use kernel='auto'"),
    ],
)
def test_flash_kernels_refuse(name, device, dtype, dims, refusal):
    found = KERNELS[name]().refusal(device, dtype, *dims)
    assert found is None if refusal is None else re.search(refusal, found)


@pytest.mark.parametrize(
    "name, device, dtype, refusal",
    [
        ("cpu", CPU, torch.float64, None),
        ("cpu", CPU, torch.float16, None),
        ("cpu", CUDA, torch.float32, "runs on the CPU and the tensors are on cuda:0; use kernel='auto'"),
        ("cpu", CPU, torch.int64, "not torch.int64"),
        ("reference", CUDA, torch.float32, None),
        ("reference", CPU, torch.int64, "not a floating-point dtype"),
    ],
)
def test_kernels_of_any_machine_refuse(name, device, dtype, refusal):
    found = KERNELS[name]().refusal(device, dtype, 300, 64)
    assert found is None if refusal is None else re.search(refusal, found)


def test_a_refusal_is_an_error_that_names_the_kernel():
    query, _, value, _ = tensors(SHAPES["narrow values"], torch.float32)
    check_kernel(CpuKernel(), query, value)
    with pytest.raises(ValueError, match=r"kernel='torch' cannot take these tensors: it runs on CUDA"):
        check_kernel(TorchKernel(), query, value)
