"""Speed of single calls of a kernel, forward and backward apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Band, Segments

from .measure import DTYPES, measure

HEADS, KEY_HEADS, DIM = 32, 8, 128


class Call(NamedTuple):
    """Attention call on tensors `[T, H, D]`."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]


def tensors(tokens: int, device: torch.device) -> list[torch.Tensor]:
    """Make query, key, value and the output's gradient."""
    torch.manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    return [torch.randn(tokens, n, DIM, device=device, dtype=DTYPES[device.type]) for n in heads]


def flops(pairs: float, products: int) -> float:
    """Operations of `products` matrix products over all pairs."""
    return 2.0 * products * DIM * HEADS * pairs


def one_call(
    kernels: list[Kernel], tokens: int, device: torch.device, bands: Sequence[Band] = (FULL, CAUSAL)
) -> Iterator[dict[str, Any]]:
    """Time each kernel, by default full and causal."""
    for band in bands:
        segments = Segments(((0, tokens),), ((0, tokens),), band)
        for kernel in kernels:
            call = call_of(kernel, segments, device)
            forward, backward = measure(call.forward, device, 3), measure(call.backward, device, 3)
            yield {
                "what": f"one call of {tokens}, {'causal' if band == CAUSAL else 'full'}, {kernel.name}",
                "kernel": kernel.name,
                "forward TFLOP/s": flops(segments.pairs, 2) / forward["ms"] / 1e9,
                "backward TFLOP/s": flops(segments.pairs, 5) / backward["ms"] / 1e9,
                "forward ms": forward["ms"],
                "backward ms": backward["ms"],
                "backward peak MiB": backward.get("peak MiB"),
            }


def small_calls(kernel: Kernel, device: torch.device) -> dict[str, Any]:
    """Time the smallest kernel calls."""
    call = call_of(kernel, Segments(((0, 128),), ((0, 128),), CAUSAL), device)
    times = 100 if device.type == "cuda" else 3

    def many(one: Callable[[], Any]) -> Callable[[], None]:
        return lambda: [one() for _ in range(times)] and None

    forward, backward = measure(many(call.forward), device), measure(many(call.backward), device)
    return {
        "what": f"calls of 128 tokens, {kernel.name}",
        "forward us": 1000 / times * forward["ms"],
        "backward us": 1000 / times * backward["ms"],
        "forward host us": 1000 / times * forward["host ms"],
        "backward host us": 1000 / times * backward["host ms"],
    }


def call_of(kernel: Kernel, segments: Segments, device: torch.device) -> Call:
    """Make the tensors of a call over its last token, and the call."""
    query, key, value, grad = tensors(segments.queries[-1][1], device)
    scores = Scores(DIM**-0.5)
    output, lse = kernel.forward(query, key, value, segments, scores)

    def forward():
        return kernel.forward(query, key, value, segments, scores)

    def backward():
        return kernel.backward(grad, query, key, value, output, lse, segments, scores)

    return Call(forward, backward)
