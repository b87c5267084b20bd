"""Speed of attention on one GPU, by kernel: single calls and ranks of rings, forward and backward apart.

Ranks run one after another. Their messages are copied within the device, so times of NVLink and NCCL are not measured.
Times of kernels, merging and the host are.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.attention.totals import combining
from hf_context_parallel.distributed.rows import Rows
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, from_cu_seqlens, whole_rows
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Segments

from ..simulation import PreparedExchange
from .measure import DTYPES, kernel_ms, kernels, measure, median_ms

HEADS, KEY_HEADS, DIM = 32, 8, 128


class Call(NamedTuple):
    """Attention call on tensors `[T, H, D]`."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device, small = torch.device(options.device), options.device == "cpu"
    present, best = kernels(device), {}
    first = next(kernel for kernel in present if kernel.name != "cudnn")  # which would compile for each layer
    for tokens in (128,) if small else (4096, 16_384, 32_768, 65_536):
        for result in one_call(present, tokens, device):
            yield result
            best[result["kernel"]] = result
    yield from merging(512 if small else 16_384, device)
    yield small_calls(first, device)
    scale = 64 if small else 1
    for kernel in present:
        for layer in layers(scale, kernel is first):
            yield ring(layer, kernel, best[kernel.name], device)


class Layer(NamedTuple):
    """Share of one rank in attention with `mask`, in which subgroups of `inner` ranks exchange heads."""

    mask: Mask
    of: str
    comm_type: str
    ranks: int
    inner: int = 1
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.comm_type} {self.ranks} x {self.mask.length // self.ranks}, {self.of}, rank {self.rank}"


def layers(scale: int, every: bool) -> Iterator[Layer]:
    """List the layers to time.

    Args:
        scale: divisor of lengths.
        every: True for all layers, False for one long document alone.
    """
    for ranks, tokens in ((8, 16_384), (4, 32_768), (8, 4096)) if every else ((8, 16_384), (8, 4096)):
        length = ranks * tokens // scale
        mask = Mask(length, whole_rows(1, length))
        for rank in (0, ranks // 2, ranks - 1):
            yield Layer(mask, "one document", "p2p", ranks, rank=rank)
        yield Layer(mask, "one document", "all_gather", ranks)
        yield Layer(mask, "one document", "a2a", ranks, ranks)
    if not every:
        return
    length = 8 * 16_384 // scale
    masks = {"a window": Mask(length, whole_rows(1, length), Pattern(sliding_window=1024 // scale))}
    for documents in (64, 500) if scale == 1 else (5,):
        lengths = torch.rand(documents, generator=torch.Generator().manual_seed(0)).pow(3).add(0.01)
        edges = torch.cat([torch.zeros(1), lengths.cumsum(0) / lengths.sum() * length]).round().long()
        masks[f"{documents} documents"] = Mask(length, (from_cu_seqlens(edges, length),))
    for name, mask in masks.items():
        for comm_type, inner in (("p2p", 1), ("all_gather", 1), ("a2a", 8)):
            yield Layer(mask, name, comm_type, 8, inner, rank=3)


def tensors(tokens: int, device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    return [torch.randn(tokens, n, DIM, device=device, dtype=DTYPES[device.type]) for n in heads]


def flops(pairs: int, products: int) -> float:
    """Operations of `products` matrix products over all pairs."""
    return 2.0 * products * DIM * HEADS * pairs


def one_call(kernels: list[Kernel], tokens: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time each kernel, causal and full."""
    query, key, value, grad = tensors(tokens, device)
    for band in (FULL, CAUSAL):
        segments = Segments(((0, tokens),), ((0, tokens),), band)
        calls = {kernel.name: ours(kernel, query, key, value, grad, segments) for kernel in kernels}
        for name, call in calls.items():
            forward, backward = measure(call.forward, device, 5), measure(call.backward, device, 5)
            yield {
                "what": f"one call of {tokens}, {'causal' if band == CAUSAL else 'full'}, {name}",
                "kernel": name,
                "forward TFLOP/s": flops(segments.pairs, 2) / forward["ms"] / 1e9,
                "backward TFLOP/s": flops(segments.pairs, 5) / backward["ms"] / 1e9,
                "forward ms": forward["ms"],
                "backward ms": backward["ms"],
                "backward peak MiB": backward.get("peak MiB"),
            }


def ours(kernel: Kernel, query, key, value, grad, segments: Segments) -> Call:
    scores = Scores(DIM**-0.5)
    output, lse = kernel.forward(query, key, value, segments, scores)

    def forward():
        return kernel.forward(query, key, value, segments, scores)

    def backward():
        return kernel.backward(grad, query, key, value, output, lse, segments, scores)

    return Call(forward, backward)


def merging(tokens: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time the merging of a second part into a third, and a copy of the same bytes."""
    part = torch.randn(tokens, HEADS, DIM, device=device, dtype=DTYPES[device.type])
    lse = torch.randn(HEADS, tokens, device=device).T
    output, total = torch.randn(tokens, HEADS, DIM, device=device), torch.randn(tokens, HEADS, device=device)
    combine, rows = combining(part), Rows.of_runs([(0, tokens)])
    found = measure(lambda: combine.merge_rows(output, part, output, total, lse, rows, rows), device)
    least = part.numel() * 2 + output.numel() * 8
    flat = torch.empty(least // 2, dtype=torch.uint8, device=device)
    other = torch.empty_like(flat)
    copied = median_ms(lambda: other.copy_(flat), device)
    how = combine.__name__.rpartition(".")[2]
    yield {"what": f"merging {tokens} rows, {how}", **found, "of a copy of the same bytes": found["ms"] / copied}


def small_calls(kernel: Kernel, device: torch.device) -> dict[str, Any]:
    """Time the smallest kernel calls."""
    query, key, value, grad = tensors(128, device)
    segments = Segments(((0, 128),), ((0, 128),), CAUSAL)
    call = ours(kernel, query, key, value, grad, segments)

    def many(one: Callable[[], Any]) -> Callable[[], None]:
        return lambda: [one() for _ in range(100)] and None

    forward, backward = measure(many(call.forward), device), measure(many(call.backward), device)
    return {
        "what": "calls of 128 tokens",
        "forward us": 10 * forward["ms"],
        "backward us": 10 * backward["ms"],
        "forward host us": 10 * forward["host ms"],
        "backward host us": 10 * backward["host ms"],
    }


def ring(layer: Layer, kernel: Kernel, base: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Time the layer of one rank. Its speed is a fraction of that of one causal call on a long sequence."""
    layout = zigzag(layer.mask.length, layer.ranks)
    strategy = build_strategy(layer.comm_type, layer.inner, layout, layer.mask, layer.rank)
    *inputs, grad = tensors(layer.mask.length // layer.ranks, device)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    exchange = PreparedExchange(
        torch.randn(1 << (26 if device.type == "cuda" else 14), device=device).to(inputs[0].dtype)
    )
    how = {"strategy": strategy, "exchange": exchange, "kernel": kernel, "scores": Scores(DIM**-0.5)}

    def forward():
        with torch.no_grad():
            return attention(*inputs, **how)

    def both():
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(attention(*inputs, **how), inputs, grad)

    first, every = measure(forward, device, 5), measure(both, device, 5)
    plans = [(strategy.plan, HEADS // layer.inner), (strategy.own, HEADS)]
    pairs = sum(plan.pairs * heads for plan, heads in plans if plan is not None) / HEADS
    backward = every["ms"] - first["ms"]
    fastest = flops(pairs, 2) / base["forward TFLOP/s"] / 1e9, flops(pairs, 5) / base["backward TFLOP/s"] / 1e9
    result = {
        "what": f"{kernel.name}, {layer}",
        "forward ms": first["ms"],
        "backward ms": backward,
        "forward of one call's": fastest[0] / first["ms"],
        "backward of one call's": fastest[1] / backward,
        "forward host ms": first["host ms"],
        "host ms": every["host ms"],
        "peak MiB": every.get("peak MiB"),
    }
    if device.type == "cuda":
        result["kernels ms"] = kernel_ms(both)
    return result
