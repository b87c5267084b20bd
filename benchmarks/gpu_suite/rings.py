"""Speed of single calls and of ranks of rings, by kernel. A ring keeps most of the speed of the fastest single call.

Ranks run one after another. Their messages are copied within the device, so times of NVLink and NCCL are not measured.
Times of kernels, merging and the host are.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

import hf_context_parallel as hcp
from hf_context_parallel.attention.auto_strategy import choose
from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import Shape, Strategy, build_strategy
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.machine import machine_of
from hf_context_parallel.planning.mask import Mask, Pattern, from_cu_seqlens, whole_rows
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Segments

from ..simulation import PreparedExchange
from .measure import DTYPES, kernel_ms, kernels, measure
from .speed import DIM, HEADS, KEY_HEADS, call_of, flops, one_call, small_calls, tensors

AIMS = {(8, 16_384): 0.95, (4, 32_768): 0.97}
"""Least speed of a ring over one document, forward and backward together, as a fraction of the fastest kernel's in one
causal call: by number of ranks and tokens of each. It is for that kernel alone. Call and ring take turns, since the
clock of a device depends on its temperature."""
TURNS = 3
LONGEST = {"cuda": 65_536, "cpu": 128}


@dataclass(frozen=True)
class Layer:
    """Share of one rank in attention with `mask`, in which subgroups of `inner` ranks exchange heads."""

    mask: Mask
    of: str
    comm_type: str
    ranks: int
    inner: int = 1
    rank: int = 0
    together: int = 1
    groups: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a rank."""
        return self.mask.length // self.ranks

    def __str__(self) -> str:
        steps = f", {self.together} owners a step" if self.together > 1 else ""
        groups = f", {self.groups} groups of heads" if self.groups > 1 else ""
        return f"{self.comm_type} {self.ranks} x {self.tokens}, {self.of}, rank {self.rank}{steps}{groups}"


@dataclass(frozen=True)
class Work:
    """Layer with its tensors, ready to run."""

    strategy: Strategy
    forward: Callable[[], torch.Tensor]
    backward: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]

    def both(self) -> tuple[torch.Tensor, ...]:
        return self.backward(self.forward())


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device, small = torch.device(options.device), options.device == "cpu"
    present = kernels(device)
    last: dict[str, dict[str, Any]] = {}
    for tokens in (LONGEST["cpu"],) if small else (4096, 16_384, LONGEST["cuda"]):
        for result in one_call(present, tokens, device, (CAUSAL,) if tokens == LONGEST["cuda"] else (FULL, CAUSAL)):
            yield result
            last[result["kernel"]] = result  # causal, and the longest
    fastest = min(last.values(), key=lambda result: result["forward ms"] + result["backward ms"])
    plain = next(kernel for kernel in present if kernel.name != "cudnn")  # which would compile for each layer
    yield small_calls(plain, device)
    for kernel in present:
        of_kernel = [*long_layers(kernel, device), *([] if kernel is not plain else packed_layers(64 if small else 1))]
        for layer in of_kernel[:: 6 if small else 1]:
            yield ring(layer, kernel, fastest, device)


def long_layers(kernel: Kernel, device: torch.device) -> Iterator[Layer]:
    """List the layers over one document: rings with the owners a step that would be chosen, and with one."""
    scale = 64 if device.type == "cpu" else 1
    for ranks, tokens in ((8, 16_384), (4, 32_768), (8, 4096)):
        mask = Mask(ranks * tokens // scale, whole_rows(1, ranks * tokens // scale))
        together = chosen(mask, ranks, kernel, device)
        for rank in (0, ranks - 1):
            yield Layer(mask, "one document", "p2p", ranks, rank=rank, together=together)
        if together > 1 and tokens == 16_384:
            yield Layer(mask, "one document", "p2p", ranks, rank=ranks - 1)
        if tokens == 32_768:
            yield Layer(mask, "one document", "p2p", ranks, rank=ranks - 1, together=together, groups=4)
        yield Layer(mask, "one document", "all_gather", ranks)
        yield Layer(mask, "one document", "a2a", ranks, ranks)


def chosen(mask: Mask, ranks: int, kernel: Kernel, device: torch.device) -> int:
    """Owners a step that a ring would have."""
    shape = Shape(HEADS, KEY_HEADS, DIM, DIM, DTYPES[device.type])
    config, machine = hcp.ContextParallelConfig(size=ranks), machine_of(device, ranks, None, kernel.name)
    return choose(config, "p2p", zigzag(mask.length, ranks), mask, shape, machine).together


def packed_layers(scale: int) -> Iterator[Layer]:
    """List layers with a window, and over documents of very different lengths, at a scale of 1 / `scale`."""
    length = 8 * 16_384 // scale
    masks = {"a window": Mask(length, whole_rows(1, length), Pattern(sliding_window=1024 // scale))}
    for documents in (64, 500) if scale == 1 else (5,):
        lengths = torch.rand(documents, generator=torch.Generator().manual_seed(0)).pow(3).add(0.01)
        edges = torch.cat([torch.zeros(1), lengths.cumsum(0) / lengths.sum() * length]).round().long()
        masks[f"{documents} documents"] = Mask(length, (from_cu_seqlens(edges, length),))
    for name, mask in masks.items():
        for comm_type, inner in (("p2p", 1), ("all_gather", 1), ("a2a", 8)):
            yield Layer(mask, name, comm_type, 8, inner, rank=3)


def work_of(layer: Layer, kernel: Kernel, device: torch.device) -> Work:
    """Make the tensors of a layer, and the layer. Backward runs in the thread that calls it."""
    layout = zigzag(layer.mask.length, layer.ranks)
    strategy = build_strategy(
        layer.comm_type, layer.inner, layout, layer.mask, layer.rank, layer.together, layer.groups
    )
    *inputs, grad = tensors(strategy.tokens, device)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    stock = torch.randn(1 << (28 if device.type == "cuda" else 14), device=device, dtype=grad.dtype)
    how = {"strategy": strategy, "exchange": PreparedExchange(stock), "kernel": kernel, "scores": Scores(DIM**-0.5)}

    def forward():
        return attention(*inputs, **how)

    def backward(output):
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(output, inputs, grad)

    return Work(strategy, forward, backward)


def ring(layer: Layer, kernel: Kernel, fastest: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Time the layer of one rank. Its speed is a fraction of that of the fastest single call."""
    work = work_of(layer, kernel, device)
    with torch.no_grad():
        first = measure(work.forward, device, 3)
    every = measure(work.both, device, 3)
    plans = [(work.strategy.plan, HEADS // layer.inner), (work.strategy.own, HEADS)]
    pairs = sum(plan.pairs * heads for plan, heads in plans if plan is not None) / HEADS
    backward = every["ms"] - first["ms"]
    ideal = [flops(pairs, n) / fastest[f"{way} TFLOP/s"] / 1e9 for way, n in (("forward", 2), ("backward", 5))]
    result = {
        "what": f"{kernel.name}, {layer}",
        "of the fastest call's": sum(ideal) / every["ms"],
        "forward of it": ideal[0] / first["ms"],
        "backward of it": ideal[1] / backward,
        "forward ms": first["ms"],
        "backward ms": backward,
        "forward host ms": first["host ms"],
        "host ms": every["host ms"],
        "peak MiB": every.get("peak MiB"),
    }
    if device.type == "cuda":
        result["kernels ms"] = kernel_ms(work.both)
    aim = AIMS.get((layer.ranks, layer.tokens))
    is_judged = aim and layer.of == "one document" and layer.comm_type == "p2p" and kernel.name == fastest["kernel"]
    # One owner a step is only shown, in rings for which more would be chosen.
    if is_judged and layer.together == chosen(layer.mask, layer.ranks, kernel, device):
        share = in_turns(work, pairs, kernel, device)
        result |= {"of one call's, in turns": share, "aim": aim, "right": share >= aim}
    return result


def in_turns(work: Work, pairs: float, kernel: Kernel, device: torch.device) -> float:
    """Speed of a layer, forward and backward together, as a fraction of that of one causal call in turns with it."""
    length = LONGEST[device.type]
    segments = Segments(((0, length),), ((0, length),), CAUSAL)
    call = call_of(kernel, segments, device)

    def of_call() -> None:
        call.forward()
        call.backward()

    ratios = []
    for _ in range(TURNS):
        alone, ring = measure(of_call, device, 1)["ms"], measure(work.both, device, 1)["ms"]
        ratios.append(alone / segments.pairs * pairs / ring)
    return median(ratios)
