"""Tests of the adapters of CUDA kernels.

The functions that they call do not run on a CPU. So stand-ins with the same signatures replace them. A stand-in checks
its arguments and computes with the reference kernel.
"""

import sys
from functools import cache
from itertools import accumulate
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_context_parallel.attention.kernels import cudnn
from hf_context_parallel.attention.kernels.registry import CudnnKernel, FlashAttnKernel, ReferenceKernel, TorchKernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Band, Segments
from tests.helpers.kernels import CALLS, SCALE, SHAPES, SOFTCAP, TOKENS, by_kernel, check, limits, tensors
from tests.helpers.simulated import in_band

told = []
"""Value of `deterministic` in each call of a backward, and "cudnn" for each call of cuDNN's."""


def packed(query, key, value, cu_queries, cu_keys, max_queries, max_keys, dropout, causal, left, right):
    """Check the arguments of a varlen call, and return its segments.

    Windows are treated as in `mha_varlen_fwd` and `set_params_fprop` (the same in 2.6 to 2.8 and in PyTorch).
    """
    assert dropout == 0
    assert query.dtype == key.dtype == value.dtype in (torch.bfloat16, torch.float16)
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    assert key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    for tensor in (query, key, value):
        assert tensor.dim() == 3 and tensor.stride(-1) == 1
        assert not any(n * tensor.itemsize % 16 for n in (tensor.storage_offset(), *tensor.stride()[:-1]))
    ranges = []
    for rows, cumulative, longest in ((query, cu_queries, max_queries), (key, cu_keys, max_keys)):
        assert cumulative.dtype == torch.int32 and cumulative.is_contiguous() and cumulative.device == rows.device
        edges = cumulative.tolist()
        ranges.append(tuple(zip(edges, edges[1:])))
        assert edges[0] == 0 and edges[-1] == len(rows)
        assert min(stop - start for start, stop in ranges[-1]) > 0
        assert max(stop - start for start, stop in ranges[-1]) <= longest
    assert len(ranges[0]) == len(ranges[1])
    assert isinstance(causal, bool) and min(left, right) >= -1
    right = 0 if causal else right
    left, right = (-1 if limit >= max_keys else limit for limit in (left, right))
    if left >= 0 and right < 0:
        right = max_keys
    elif left < 0 and right > 0:  # right == 0 is causal
        left = max_keys
    return Segments(*ranges, Band(*(None if limit == -1 else limit for limit in (left, right))))


def packed_forward(query, key, value, *lengths_and_dropout, scale, causal, left, right, softcap=0.0):
    """Compute the output and the LSE `[H, Q]`."""
    segments = packed(query, key, value, *lengths_and_dropout, causal, left, right)
    output, lse = ReferenceKernel().forward(query, key, value, segments, Scores(scale, softcap or None))
    return output, lse.T.contiguous()


def packed_backward(
    grad, query, key, value, output, lse, *lengths_and_dropout, scale, causal, left, right, softcap=0.0, deterministic
):
    """Compute the gradients of query, key and value."""
    told.append(deterministic)
    segments = packed(query, key, value, *lengths_and_dropout, causal, left, right)
    for tensor in (grad, output):
        assert (tensor.shape, tensor.dtype, tensor.stride(-1)) == (query.shape, query.dtype, 1)
    assert lse.shape == (query.shape[1], len(query)) and lse.dtype == torch.float32 and lse.is_contiguous()
    tensors, scores = (grad, query, key, value, output, lse.T), Scores(scale, softcap or None)
    return [share.to(query.dtype) for share in ReferenceKernel().backward(*tensors, segments, scores)]


def one_tile(query, key, value, causal):
    """Turn `[1, H, T, D]` tensors of cuDNN to tokens first, and return them with the one tile of the call."""
    for tensor in (query, key, value):
        assert tensor.dim() == 4 and len(tensor) == 1 and tensor.stride(-1) == 1 and tensor.shape[-1] % 8 == 0
        assert not any(n * tensor.itemsize % 16 for n in (tensor.storage_offset(), *tensor.stride()[:-1]))
    assert key.shape[:3] == value.shape[:3] and query.shape[1] % key.shape[1] == 0
    assert isinstance(causal, bool) and (
        not causal or query.shape[2] == key.shape[2]
    )  # cuDNN aligns masks at the top left
    segments = Segments(((0, query.shape[2]),), ((0, key.shape[2]),), CAUSAL if causal else FULL)
    return [tensor[0].transpose(0, 1) for tensor in (query, key, value)], segments


class StandInForAten(TorchDispatchMode):
    """Stand-in for PyTorch's operators. Their schemas are checked before a call arrives here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_cudnn_attention.default:
            return self.cudnn_forward(*args, **kwargs)
        if func is torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default:
            return self.cudnn_backward(*args, **kwargs)
        if func is torch.ops.aten._flash_attention_forward.default:
            return self.forward(*args, **kwargs)
        if func is torch.ops.aten._flash_attention_backward.default:
            return self.backward(*args, **kwargs)
        return func(*args, **(kwargs or {}))

    def cudnn_forward(self, query, key, value, bias, lse_wanted, dropout=0.0, causal=False, *, scale):
        assert bias is None and lse_wanted and dropout == 0
        tensors, segments = one_tile(query, key, value, causal)
        output, lse = ReferenceKernel().forward(*tensors, segments, Scores(scale))
        state = torch.empty((), dtype=torch.int64)
        lengths = None, None, query.shape[2], key.shape[2]
        return output.transpose(0, 1)[None], lse.T[None, :, :, None], *lengths, state, state, torch.empty(0)

    def cudnn_backward(self, grad, query, key, value, output, lse, *rest, scale):
        seed, offset, bias, cu_queries, cu_keys, max_queries, max_keys, dropout, causal = rest
        assert seed.dtype == offset.dtype == torch.int64 and dropout == 0
        assert bias is cu_queries is cu_keys is None
        assert (max_queries, max_keys) == (query.shape[2], key.shape[2])
        assert lse.shape == (*query.shape[:3], 1) and lse.dtype == torch.float32 and lse.is_contiguous()
        tensors, segments = one_tile(query, key, value, causal)
        grad, output = (tensor[0].transpose(0, 1) for tensor in (grad, output))
        told.append("cudnn")
        found = ReferenceKernel().backward(grad, *tensors, output, lse[0, :, :, 0].T, segments, Scores(scale))
        return [share.to(query.dtype).transpose(0, 1)[None] for share in found]

    def forward(self, *args, scale, window_size_left=-1, window_size_right=-1):
        *tensors_and_lengths, causal, debug = args
        assert not debug
        window = {"left": window_size_left, "right": window_size_right}
        output, lse = packed_forward(*tensors_and_lengths, scale=scale, causal=causal, **window)
        return output, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(self, *args, scale, window_size_left=-1, window_size_right=-1):
        *tensors_and_lengths, causal, state, unused = args
        assert state.dtype == unused.dtype == torch.uint64
        window = {"left": window_size_left, "right": window_size_right}
        deterministic = torch.get_deterministic_debug_mode() == 2  # in mode 1 the operator only warns
        return packed_backward(*tensors_and_lengths, scale=scale, causal=causal, **window, deterministic=deterministic)


def flash_attn_2_6():
    """Interface of flash-attn 2.6.0. Later 2.6 versions have defaults for the arguments after `causal`."""

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
        assert (alibi_slopes, return_softmax, block_table) == (None, False, None)
        out, softmax_lse = packed_forward(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p),
            scale=softmax_scale,
            causal=causal,
            left=window_size[0],
            right=window_size[1],
            softcap=softcap,
        )
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
        assert alibi_slopes is None
        grads = packed_backward(
            *(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p),
            scale=softmax_scale,
            causal=causal,
            left=window_size[0],
            right=window_size[1],
            softcap=softcap,
            deterministic=deterministic,
        )
        for grad, computed in zip((dq, dk, dv), grads):
            grad.copy_(computed)
        return dq, dk, dv, torch.empty(0)

    return _flash_attn_varlen_forward, _flash_attn_varlen_backward


@cache
def flash_attn_since_2_7(minor, more=""):
    """Interface of flash-attn 2.7 and 2.8: operators of PyTorch, with a typed schema and no Python signature."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, causal, left=-1, right=-1, softcap=0.0, *unused):
        assert not any(unused)
        options = {"scale": scale, "causal": causal, "left": left, "right": right, "softcap": softcap}
        out, lse = packed_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, **options)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, dropout, scale, causal, *others):
        left, right, softcap, alibi_slopes, deterministic, *unused = others
        assert alibi_slopes is None and not any(unused)
        options = {"scale": scale, "causal": causal, "left": left, "right": right, "softcap": softcap}
        lengths = cu_q, cu_k, max_q, max_k, dropout
        grads = packed_backward(dout, q, k, v, out, lse, *lengths, **options, deterministic=deterministic)
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


@pytest.fixture(params=["torch", "cudnn", *FLASH_ATTN])
def adapter(request, monkeypatch):
    """Fixture of each CUDA kernel, with a stand-in for the function that it calls."""
    if request.param in ("torch", "cudnn"):
        monkeypatch.setattr(cudnn, "SHORTEST", 1)
        monkeypatch.setattr(cudnn, "_widest_head", lambda device: 256)
        with StandInForAten():
            yield TorchKernel() if request.param == "torch" else CudnnKernel()
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


tiles = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tiles, st.builds(Band, limits, limits))
def test_adapters_bands(adapter, tiles, band):
    """Compute bands of many lengths, since FlashAttention changes windows by the longest key range."""
    assume(all(in_band(*tile, band).any(1).all() for tile in tiles))
    queries, keys = ([0, *accumulate(side)] for side in zip(*tiles))
    call = Segments(*(tuple(zip(edges, edges[1:])) for edges in (queries, keys)), band)
    assume(max(queries[-1], keys[-1]) <= TOKENS)
    check(adapter, [call], "grouped", torch.bfloat16, least=10.0)  # with one key the gradient of a query is 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("calls", ["queries that read in several calls", "queries that read in several windows"])
def test_adapters_shapes(adapter, calls, shape):
    check(adapter, calls, shape, torch.bfloat16)


@pytest.mark.parametrize("adapter", FLASH_ATTN, indirect=True)
@pytest.mark.parametrize("calls", CALLS)
def test_adapters_of_kernels_with_a_softcap(adapter, calls):
    check(adapter, calls, "grouped", torch.bfloat16, SOFTCAP)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("everywhere", [0, 1, 2], ids=["no", "warns", "yes"])
def test_adapters_ask_for_determinism(adapter, wanted, everywhere):
    """Check `deterministic`, also for PyTorch's kernel, which reads the global setting and must restore it."""
    whole = tensors(SHAPES["grouped"], torch.bfloat16)
    told.clear()
    torch.set_deterministic_debug_mode(everywhere)
    try:
        by_kernel(adapter, CALLS["windows"], Scores(SCALE, deterministic=wanted), *whole)
        assert torch.get_deterministic_debug_mode() == everywhere
    finally:
        torch.use_deterministic_algorithms(False)
    assert told == [wanted or (everywhere == 2 and adapter.name in ("torch", "cudnn"))]


@pytest.mark.parametrize("adapter", ["cudnn"], indirect=True)
@pytest.mark.parametrize(
    "calls, taken",
    [
        ("a tile", True),
        ("a causal tile", True),
        ("several tiles", False),
        ("causal tiles of more keys", False),
        ("windows", False),
    ],
)
def test_cudnn_computes_one_plain_tile_and_pytorchs_kernel_the_rest(adapter, calls, taken, monkeypatch):
    whole = tensors(SHAPES["grouped"], torch.bfloat16)
    told.clear()
    by_kernel(adapter, CALLS[calls], Scores(SCALE), *whole)
    assert told == ["cudnn" if taken else False]
    told.clear()
    by_kernel(adapter, CALLS[calls], Scores(SCALE, deterministic=True), *whole)
    assert told == [True]
    monkeypatch.setattr(cudnn, "SHORTEST", 1000)
    told.clear()
    by_kernel(adapter, CALLS[calls], Scores(SCALE), *whole)
    assert told == [False]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("calls", ["several tiles", "several causal tiles", "windows of more keys"])
def test_pytorchs_own_operators_take_the_call(calls, shape):
    """Check the calls by the operators' schemas and by the shapes of their results, on the meta device."""
    query, key, value, grad = tensors(SHAPES[shape], torch.bfloat16, "meta")
    (call,) = CALLS[calls]
    rows, keys = (sum(stop - start for start, stop in ranges) for ranges in (call.queries, call.keys))
    output, lse = TorchKernel().forward(query, key, value, call, Scores(SCALE))
    assert (output.shape, output.dtype) == ((rows, *grad.shape[1:]), query.dtype)
    assert (lse.shape, lse.dtype) == ((rows, query.shape[1]), torch.float32)
    lse = torch.empty(query.shape[:2], device="meta")
    shares = TorchKernel().backward(grad, query, key, value, torch.empty_like(grad), lse, call, Scores(SCALE))
    assert [share.shape for share in shares] == [
        (rows, *query.shape[1:]),
        (keys, *key.shape[1:]),
        (keys, *value.shape[1:]),
    ]
