"""Checks and speed of FlashAttention-4, which this package does not call yet.

A usable kernel returns an LSE, and its backward takes an output and an LSE over more keys than its own. Both are
compared with the reference kernel in float32.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from hf_context_parallel.attention.kernels.registry import KERNELS
from hf_context_parallel.attention.merge import merge_
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Band, Segments

from .measure import errors, measure
from .speed import flops

ALL, ROW = 0.015, 0.08
WINDOW = Band(127, 0)
Tensors = tuple[torch.Tensor, ...]


def forward(query, key, value, band: Band) -> tuple[Tensors, tuple]:
    """Call FlashAttention-4 for packed rows, with one segment."""
    from flash_attn.cute.interface import _flash_attn_fwd

    lengths = [torch.tensor([0, len(tensor)], dtype=torch.int32, device=query.device) for tensor in (query, key)]
    output, lse, *_ = _flash_attn_fwd(
        query,
        key,
        value,
        cu_seqlens_q=lengths[0],
        cu_seqlens_k=lengths[1],
        max_seqlen_q=len(query),
        max_seqlen_k=len(key),
        softmax_scale=query.shape[-1] ** -0.5,
        causal=band == CAUSAL,
        window_size_left=band.left,
        window_size_right=None if band == CAUSAL else band.right,
        return_lse=True,
    )
    return (output, lse.transpose(0, 1)), tuple(lengths)


def backward(grad, query, key, value, output, lse, band: Band, state: tuple) -> Tensors:
    from flash_attn.cute.interface import _flash_attn_bwd

    found = _flash_attn_bwd(
        query,
        key,
        value,
        output,
        grad,
        lse.transpose(0, 1).contiguous(),
        softmax_scale=query.shape[-1] ** -0.5,
        causal=band == CAUSAL,
        window_size_left=band.left,
        window_size_right=None if band == CAUSAL else band.right,
        cu_seqlens_q=state[0],
        cu_seqlens_k=state[1],
        max_seqlen_q=len(query),
        max_seqlen_k=len(key),
    )
    return tuple(found[:3])


CASES = {
    "square": (1024, 1024, 32, 8, 128, 128),
    "fewer queries": (300, 1500, 8, 8, 64, 64),
    "one key head": (513, 513, 8, 1, 128, 128),
    "dim 256": (512, 512, 8, 4, 256, 256),
    "dims 192 and 128": (512, 512, 16, 16, 192, 128),
    "odd lengths": (129, 777, 8, 2, 128, 128),
}
"""Queries, keys, query heads, key heads, and the head dims of keys and values."""


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    if options.device != "cuda":
        return
    try:
        import flash_attn.cute.interface  # noqa: F401
    except ImportError as error:
        yield {"what": "flash-attn-4 is not here", "error": str(error)[:200]}
        return
    for tokens in (4096, 16_384, 65_536):
        for label, band in (("full", FULL), ("causal", CAUSAL)):
            yield {"what": f"{tokens}, {label}", **timed(tokens, band)}
    for case, shape in CASES.items():
        for label, band in (("full", FULL), ("causal", CAUSAL), ("window", WINDOW)):
            start = time.perf_counter()
            try:
                found = compared(shape, band)
            except Exception as error:
                found = {"takes it": False, "error": f"{type(error).__name__}: {str(error)[:200]}"}
            yield {"what": f"{case}, {label}", **found, "first call s": time.perf_counter() - start}


def _tensors(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Make a query, views of packed keys/values, further keys/values, and the gradient of the output."""
    queries, keys, heads, key_heads, dim, value_dim = shape
    torch.manual_seed(0)

    def made(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)

    both = made(keys, key_heads, dim + value_dim)
    others = made(70, key_heads, dim), made(70, key_heads, value_dim)
    return [made(queries, heads, dim), both[..., :dim], both[..., dim:], *others, made(queries, heads, value_dim)]


def compared(shape: tuple[int, ...], band: Band) -> dict[str, Any]:
    query, key, value, other_key, other_value, grad = _tensors(shape)
    reference, scores = KERNELS["reference"](), Scores(query.shape[-1] ** -0.5)
    (output, lse), state = forward(query, key, value, band)
    exact = [tensor.float() for tensor in (query, key, value)]
    call = Segments(((0, len(query)),), ((0, len(key)),), band)
    expected, expected_lse = reference.forward(*exact, call, scores)
    whole, whole_lse = expected.clone(), expected_lse.clone()
    every = Segments(call.queries, ((0, len(other_key)),))
    merge_(
        whole,
        whole_lse,
        call.query_runs,
        *reference.forward(exact[0], other_key.float(), other_value.float(), every, scores),
    )
    rounded = whole.to(query.dtype)
    grads = backward(grad, query, key, value, rounded, whole_lse, band, state)
    truth = reference.backward(grad.float(), *exact, rounded.float(), whole_lse, call, scores)
    by_tensor = [errors(output, expected), *(errors(got, want) for got, want in zip(grads, truth))]
    worst = {key: max(error[key] for error in by_tensor) for key in ("all", "row")}
    lse_error = (lse.float() - expected_lse).abs().max().item()
    right = worst["all"] <= ALL and worst["row"] <= ROW and lse_error <= 1e-3
    return {"takes it": right, **worst, "lse": lse_error, "lse dtype": str(lse.dtype)}


def timed(tokens: int, band: Band) -> dict[str, Any]:
    query, key, value, *_, grad = _tensors((tokens, tokens, 32, 8, 128, 128))
    device = query.device
    (output, lse), state = forward(query, key, value, band)
    first = measure(lambda: forward(query, key, value, band), device, 5)
    last = measure(lambda: backward(grad, query, key, value, output, lse, band, state), device, 5)
    pairs = Segments(((0, tokens),), ((0, tokens),), band).pairs
    return {
        "forward TFLOP/s": flops(pairs, 2) / first["ms"] / 1e9,
        "backward TFLOP/s": flops(pairs, 5) / last["ms"] / 1e9,
        "forward ms": first["ms"],
        "backward ms": last["ms"],
        "forward host ms": first["host ms"],
        "backward host ms": last["host ms"],
        "backward peak MiB": last["peak MiB"],
    }
