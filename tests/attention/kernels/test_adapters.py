"""Tests of the adapters of CUDA kernels.

The functions that they call do not run on a CPU. So stand-ins with the same signatures replace them. A stand-in checks
its arguments and computes with the reference kernel.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_context_parallel.attention.kernels import cudnn, flash_attn_3, flash_attn_4, torch_cuda, varlen
from hf_context_parallel.attention.kernels.registry import KERNELS, CudnnKernel, ReferenceKernel, TorchKernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.machine import attention_flops
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Band, Segments
from tests.attention.kernels.stand_ins import SIGNATURES, interface, packed_backward, packed_forward, told
from tests.helpers.kernels import CALLS, SCALE, SHAPES, SOFTCAP, TOKENS, by_kernel, check, limits, tensors
from tests.helpers.simulated import in_band


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

    def forward(self, *args, **options):
        names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "causal")
        *call, debug = args
        assert not debug
        output, lse = packed_forward("flash_attn", _named(names, call, options))
        return output, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(self, *args, **options):
        names = ("dout", "q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        *call, state, unused = args
        assert state.dtype == unused.dtype == torch.uint64
        deterministic = torch.get_deterministic_debug_mode() == 2  # in mode 1 the operator only warns
        given = _named((*names, "dropout_p", "causal"), call, options)
        return packed_backward("flash_attn", {**given, "deterministic": deterministic})


def _named(names, values, options):
    """Arguments of an operator of PyTorch by the names of FlashAttention."""
    window = {side: options.pop(f"window_size_{side}", None) for side in ("left", "right")}
    named = dict(zip(names, values, strict=True))
    return {**named, "softmax_scale": options.pop("scale"), "window_size": tuple(window.values()), **options}


OFTEN = ["flash_attn 2.6.0", "flash_attn 2.8.4", "flash_attn_3 2026-03", "flash_attn_4 4.0.0b36"]
"""Versions for which everything is computed. Two calls are for all versions."""


@pytest.fixture(params=["torch", "cudnn", *OFTEN])
def adapter(request, monkeypatch):
    """Fixture of each CUDA kernel, with a stand-in for the functions that it calls."""
    if request.param in ("torch", "cudnn"):
        monkeypatch.setattr(cudnn, "SHORTEST", 1)
        monkeypatch.setattr(cudnn, "_widest_head", lambda device: 256)
        with StandInForAten():
            yield TorchKernel() if request.param == "torch" else CudnnKernel()
        return
    library = request.param.split()[0]
    if library == "flash_attn":
        package = ModuleType("flash_attn")
        package.flash_attn_interface = interface(request.param)
        monkeypatch.setitem(sys.modules, "flash_attn", package)
    else:
        module = flash_attn_3 if library == "flash_attn_3" else flash_attn_4
        monkeypatch.setattr(module, "interface", lambda: interface(request.param))
    yield KERNELS[library]()


@pytest.mark.parametrize("calls", CALLS)
def test_adapters_calls(adapter, calls):
    check(adapter, calls, "grouped", torch.bfloat16)


tiles = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


@pytest.mark.parametrize("adapter", ["torch", *OFTEN[1:]], indirect=True)
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


@pytest.mark.parametrize("adapter", OFTEN, indirect=True)
@pytest.mark.parametrize("calls", CALLS)
def test_adapters_of_kernels_with_a_softcap(adapter, calls):
    check(adapter, calls, "grouped", torch.bfloat16, SOFTCAP)


@pytest.mark.parametrize("adapter", SIGNATURES, indirect=True)
def test_adapters_of_every_version(adapter):
    check(adapter, "queries that read in several calls", "grouped", torch.bfloat16)
    check(adapter, "queries that read in several windows", "grouped", torch.float16, SOFTCAP)


@pytest.mark.parametrize("adapter", OFTEN[2:], indirect=True)
def test_dims_of_latent_attention_are_not_padded(adapter):
    """Compute the head dims of DeepSeek's attention, and unequal ones of grouped heads, which are padded."""
    query, value = torch.empty(1, 16, 192), torch.empty(1, 16, 128)
    assert adapter.head_dims(query, value) == (192, 128)
    assert adapter.head_dims(torch.empty(1, 4, 40), torch.empty(1, 4, 20)) == (40, 40)
    for shape in ("latent", "grouped latent"):
        check(adapter, "queries that read in several windows", shape, torch.bfloat16)


def same(found, expected):
    return all(got.equal(want) for got, want in zip(found, expected, strict=True))


@pytest.mark.parametrize("adapter", ["torch", *OFTEN[1:]], indirect=True)
def test_calls_beyond_32_bit_offsets_are_cut_by_heads(adapter, monkeypatch):
    """Compare with one call for all heads, in which the stand-ins compute the same numbers."""
    calls, scores = CALLS["queries that read in several windows"], Scores(SCALE)
    whole = tensors(SHAPES["grouped"], torch.bfloat16)  # 3 query heads for each of 2 key heads
    expected = by_kernel(adapter, calls, scores, *whole)
    told.clear()
    by_kernel(adapter, calls, scores, *whole)
    assert len(told) == len(calls)
    rows = 18 + 4 * varlen.BLOCK  # of the longer call; the head dim counts as 32
    monkeypatch.setattr(varlen, "MOST_ELEMENTS", 5 * rows * 32)
    told.clear()
    assert same(by_kernel(adapter, calls, scores, *whole), expected)
    assert len(told) == (len(calls) if adapter.name == "flash_attn_3" else 2 * len(calls) - 1)
    monkeypatch.setattr(varlen, "MOST_ELEMENTS", 3 * rows * 32 - 1)
    if adapter.name == "flash_attn_3":
        assert same(by_kernel(adapter, calls, scores, *whole), expected)
        monkeypatch.setattr(varlen, "MOST_ELEMENTS", rows * 32 - 1)
    said = r"kernel='\w+' cannot compute 18 queries and 18 keys in one call, .*32-bit offsets. Set a larger size"
    with pytest.raises(ValueError, match=said):
        by_kernel(adapter, calls, scores, *whole)


def test_heads_of_rows_that_lie_far_apart_are_copied(monkeypatch):
    rows = torch.randn(10, 4, 8)
    assert varlen._heads(rows, slice(1, 3)).data_ptr() == rows[:, 1].data_ptr()
    monkeypatch.setattr(varlen, "MOST_ELEMENTS", 10 * 4 * 8 - 1)
    copied = varlen._heads(rows, slice(1, 3))
    assert copied.is_contiguous() and copied.equal(rows[:, 1:3])


@pytest.mark.parametrize("adapter", ["torch", *OFTEN[1:]], indirect=True)
def test_expanded_gradients_of_keys_are_bounded(adapter, monkeypatch):
    calls, scores = CALLS["a causal tile"], Scores(SCALE)
    expected = by_kernel(adapter, calls, scores, *tensors(SHAPES["grouped"], torch.bfloat16))
    monkeypatch.setattr(varlen, "MOST_EXPANDED", 17 * 3 * 32 * 2)  # of one key head
    told.clear()
    assert same(by_kernel(adapter, calls, scores, *tensors(SHAPES["grouped"], torch.bfloat16)), expected)
    assert len(told) == (2 if adapter.expands_keys else 1)
    told.clear()
    by_kernel(adapter, calls, scores, *tensors(SHAPES["equal heads"], torch.bfloat16))  # nothing is expanded
    assert len(told) == 1


UNEVEN = ((0, 1), (1, 3), (3, 14), (14, 15), (15, 20), (20, 23))


@pytest.mark.parametrize("adapter", ["torch", *OFTEN[1:]], indirect=True)
@pytest.mark.parametrize("band", [CAUSAL, Band(2, 0), Band(2, 3)])
def test_segments_of_very_different_lengths_are_sorted(adapter, band, monkeypatch):
    monkeypatch.setattr(varlen, "BLOCK", 1)
    whole = tensors(SHAPES["grouped"], torch.bfloat16)
    expected = by_kernel(adapter, [Segments(UNEVEN, UNEVEN, band)], Scores(SCALE), *whole)
    monkeypatch.setattr(varlen, "MOST_EMPTY", 2)
    call = Segments(UNEVEN, UNEVEN, band)
    told.clear()
    assert same(by_kernel(adapter, [call], Scores(SCALE), *whole), expected)
    assert len(told) == (3 if adapter.grid_of_longest else 1)  # of 1 and 2 rows, of 3 and 5, and of 11
    kept = dict(call.kept)
    by_kernel(adapter, [call], Scores(SCALE), *whole)
    assert all(call.kept[place] is calls for place, calls in kept.items()) and len(kept) == 1
    check(adapter, [call], "grouped", torch.bfloat16)


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


def test_pytorchs_kernel_passes_no_limit_as_none(monkeypatch):
    """Check that another implementation that is activated in PyTorch takes a causal call for no window."""
    passed = []

    class Passed(StandInForAten):
        def forward(self, *args, **options):
            passed.append((args[8], options.get("window_size_left"), options.get("window_size_right")))
            return super().forward(*args, **options)

        def backward(self, *args, **options):
            passed.append((args[11], options.get("window_size_left"), options.get("window_size_right")))
            return super().backward(*args, **options)

    whole = tensors(SHAPES["grouped"], torch.bfloat16)
    monkeypatch.setattr(torch_cuda, "current_flash_attention_impl", lambda: "FA4")
    with Passed():
        by_kernel(TorchKernel(), CALLS["a tile"], Scores(SCALE), *whole)
        by_kernel(TorchKernel(), CALLS["a causal tile"], Scores(SCALE), *whole)
        assert passed == [(False, None, None)] * 2 + [(True, None, None)] * 2
        with pytest.raises(ValueError, match=r"implementation 'FA4' of PyTorch, whose backward takes no windows"):
            by_kernel(TorchKernel(), CALLS["windows"], Scores(SCALE), *whole)
    assert "FA4 of PyTorch, has no softcap" in TorchKernel().refusal(
        torch.device("cuda"), torch.bfloat16, 64, 64, Scores(SCALE, SOFTCAP)
    )


@pytest.mark.parametrize("adapter", ["cudnn"], indirect=True)
@pytest.mark.parametrize(
    "calls, taken",
    [
        ("a tile", True),
        ("a causal tile", True),
        ("several tiles", True),
        ("causal tiles of more keys", True),
        ("windows", False),
    ],
)
def test_cudnn_computes_plain_tiles_and_pytorchs_kernel_the_rest(adapter, calls, taken, monkeypatch):
    whole = tensors(SHAPES["grouped"], torch.bfloat16)
    told.clear()
    by_kernel(adapter, CALLS[calls], Scores(SCALE), *whole)
    assert set(told) == {"cudnn" if taken else False}
    told.clear()
    if calls == "several tiles":
        with monkeypatch.context() as few:
            few.setattr(cudnn, "MOST_SEGMENTS", 1)
            by_kernel(adapter, CALLS[calls], Scores(SCALE), *whole)
        assert told == [False]
        told.clear()
    by_kernel(adapter, CALLS[calls], Scores(SCALE, deterministic=True), *whole)
    assert told == [True]
    told.clear()
    torch.use_deterministic_algorithms(True)
    try:
        by_kernel(adapter, CALLS[calls], Scores(SCALE), *whole)
    finally:
        torch.use_deterministic_algorithms(False)
    assert told == [True]
    monkeypatch.setattr(cudnn, "SHORTEST", 1000)
    told.clear()
    by_kernel(adapter, CALLS[calls], Scores(SCALE), *whole)
    assert told == [False]


class Noted(StandInForAten):
    """Stand-in for PyTorch's operators that notes which of them are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.__name__:
            self.names.append("cudnn" if "cudnn" in func.__name__ else "flash")
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def thrifty(monkeypatch):
    """Fixture of cuDNN's kernel as `auto` makes it, with a stand-in that notes the operators of a function."""
    monkeypatch.setattr(cudnn, "SHORTEST", 1)
    monkeypatch.setattr(cudnn, "_widest_head", lambda device: 256)
    monkeypatch.setattr(cudnn, "PAYS", 2.5 * attention_flops(18 * 7, *SHAPES["grouped"][:3:2], 16))
    kernel, whole = CudnnKernel(compiles_at_once=False), tensors(SHAPES["grouped"], torch.bfloat16)

    def computed(*calls):
        with Noted() as noted:
            for call in calls:
                by_kernel(kernel, [call], Scores(SCALE), *whole)
        return noted.names

    return computed


TILE = Segments(((0, 7),), ((2, 20),))


def test_a_shape_goes_to_cudnn_when_compiling_has_paid(thrifty):
    """Check both passes: three forwards have 2.5 times the work of one, and so has one backward."""
    both = [thrifty(TILE) for _ in range(5)]
    assert both == [["flash", "flash"], ["flash", "cudnn"], ["flash", "cudnn"], ["cudnn", "cudnn"], ["cudnn", "cudnn"]]
    # Another thread compiles its own plans, and other ranges of the same lengths need none.
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(thrifty, TILE).result() == ["flash", "flash"]
    assert thrifty(Segments(((3, 10),), ((0, 18),))) == ["cudnn", "cudnn"]


def test_lengths_that_do_not_come_back_are_never_compiled(thrifty, monkeypatch):
    monkeypatch.setattr(cudnn, "MOST_SHAPES", 6)
    new = [Segments(((0, rows),), ((0, rows),), CAUSAL) for rows in range(2, 20)]
    assert set(thrifty(*new)) == {"flash"}
    assert set(thrifty(*new)) == {"flash"}  # the last ones alone are counted, by pass
    assert thrifty(*[TILE] * 4)[-2:] == ["cudnn", "cudnn"]


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
