"""Which strategy is fastest for a mask: estimated from counts, so that all ranks choose alike without a message."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .attention.p2p import accumulation_dtype
from .attention.strategy import Shape
from .config import ContextParallelConfig
from .cost import BACKWARD, CPU, H100_NODE, Machine, attention_flops
from .demand import Demand, demand
from .layout import Layout
from .mask import Mask, Pattern


class Choice(NamedTuple):
    """A strategy by name, the ranks of its subgroups, and why."""

    comm_type: str
    inner: int
    reason: str = ""


@dataclass(frozen=True)
class Estimate:
    """Seconds of the slowest rank for a layer, forward and backward: computing, and what messages add."""

    computing: float
    messages: float

    @property
    def total(self) -> float:
        return self.computing + self.messages


def inner_size(config: ContextParallelConfig, comm_type: str, shape: Shape) -> int:
    """Ranks of a subgroup that exchange heads.

    Unless it is set, as many as divide both the key heads and the group, so that no key goes to two of them
    (USP's rule).
    """
    if comm_type == "a2a":
        return config.size
    if comm_type == "a2a+p2p":
        return config.a2a_size or math.gcd(shape.key_heads, config.size)
    return 1


def choose(
    config: ContextParallelConfig, comm_type: str, layout: Layout, mask: Mask, shape: Shape, machine: Machine
) -> Choice:
    """What `comm_type` is for a layer: the fastest of all by estimate, if it is `"auto"`."""
    if comm_type != "auto":
        return Choice(comm_type, inner_size(config, comm_type, shape))
    if layout.size == 1:
        return Choice("p2p", 1, "one rank")
    here = demand(layout, mask)
    times = {
        candidate: estimate(*candidate, layout, mask, shape, machine, here).total
        for candidate in candidates(config, shape)
    }
    best, *others = sorted(times, key=times.__getitem__)
    mean = sum(here.pairs) / layout.size
    balance = f"where queries stay, the slowest rank has {max(here.pairs) / mean:.2f} of the mean work" if mean else ""
    listed = ", ".join(f"{_named(other)} {times[other] * 1e3:.3g}" for other in others)
    reason = f"an estimated {times[best] * 1e3:.3g} ms a layer, {listed}; {balance}"
    return Choice(*best, reason)


def candidates(config: ContextParallelConfig, shape: Shape) -> list[tuple[str, int]]:
    """The strategies that a layer could be computed by, with the ranks of their subgroups."""
    size = config.size
    found = [("p2p", 1), ("all_gather", 1)]
    if shape.heads >= size:
        found.append(("a2a", size))
    inner = [config.a2a_size] if config.a2a_size else [n for n in range(2, size) if size % n == 0]
    return found + [("a2a+p2p", n) for n in inner if 1 < n < size and n <= shape.heads]


def _named(candidate: tuple[str, int]) -> str:
    return f"{candidate[0]} of {candidate[1]}" if candidate[0] == "a2a+p2p" else candidate[0]


def estimate(
    comm_type: str,
    inner: int,
    layout: Layout,
    mask: Mask,
    shape: Shape,
    machine: Machine,
    here: Demand | None = None,
) -> Estimate:
    """What a layer takes on the slowest rank.

    Args:
        here: the layout's demand, where the caller has it.
    """
    here = here or demand(layout, mask)
    outer = here if inner == 1 else demand(layout.merged(inner), mask)
    size = shape.dtype.itemsize
    sums = accumulation_dtype(shape.dtype).itemsize
    width = shape.query_dim + shape.value_dim
    busiest = -(-shape.heads // inner)  # query heads of the rank that has most
    key_heads = max(-(-shape.key_heads // inner), 1)
    worst = Estimate(0.0, 0.0)
    for rank in range(layout.size):
        of = rank // inner
        if inner == 1:
            flops = attention_flops(here.pairs[rank], shape.heads, shape.query_dim, shape.value_dim)
        else:
            shared = outer.pairs[of] - sum(here.own_pairs[of * inner : (of + 1) * inner])
            flops = attention_flops(shared, busiest, shape.query_dim, shape.value_dim)
            flops += attention_flops(here.own_pairs[rank], shape.heads, shape.query_dim, shape.value_dim)
        calls, rows = (1 + outer.owners[of], outer.merged[of]) if comm_type != "all_gather" else (2, 0)
        computing = (1 + BACKWARD) * flops / machine.attention + 2 * calls * machine.launch
        # Keys travel in both passes and sums of gradients in one; a ring crosses nodes with all of them.
        ring = outer.read[of] * key_heads * width * (2 * size + sums)
        far = ring if layout.size > machine.node and comm_type != "all_gather" else ring * _beyond(layout, machine, 1)
        moving = machine.transfer(ring - far, far, 3 * outer.owners[of])
        # Merged rows are read and written in float32, with the part that joins them, forward and backward.
        added = 2 * rows * busiest * width * (2 * sums + size) / machine.memory
        if comm_type == "all_gather":
            added += 2 * (here.read[rank] + here.tokens[rank]) * key_heads * width * size / machine.memory
        hidden = machine.overlap * min(computing, moving) if comm_type != "all_gather" else 0.0
        added += moving - hidden
        if inner > 1:
            # Queries, keys and values there, outputs back, and the gradients of all of them.
            mine = here.travelling[rank]
            numbers = 2 * mine * (shape.heads * width + key_heads * inner * width)
            sent = numbers * size * (inner - 1) / inner
            across = sent * _beyond(layout, machine, inner)
            added += machine.transfer(sent - across, across, 4 * (inner - 1)) + 4 * numbers * size / machine.memory
        worst = max(worst, Estimate(computing, added), key=lambda estimate: estimate.total)
    return worst


def _beyond(layout: Layout, machine: Machine, inner: int) -> float:
    """The share of messages to all ranks of a group that leaves the node: of a subgroup's, or of all ranks'."""
    ranks = layout.size if inner == 1 else inner
    return max(0.0, 1 - machine.node / ranks)


def layer_type(pattern: Pattern) -> str:
    """What Transformers calls layers with a mask of this pattern."""
    if pattern.sliding_window is not None:
        return "sliding_attention"
    return "full_attention" if pattern.chunk_size is None else "chunked_attention"


def machine_of(device: torch.device, node: int) -> Machine:
    """The rates that choices for a device are made with, for so many ranks of the group a node."""
    return replace(H100_NODE if device.type == "cuda" else CPU, node=node)
