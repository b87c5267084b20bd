"""Number of owners whose keys a ring computes with at each step.

With more owners there are fewer kernel calls, merges and messages. Keys of more owners are held at a time, and more of
them travel before anything but a rank's own keys can be computed.
"""

from __future__ import annotations

from typing import NamedTuple

from ..distributed.messages import accumulation_dtype
from ..planning.machine import BACKWARD, Machine, attention_flops
from .strategy import Shape

MOST_BYTES = 2**30
"""Bytes of keys/values and of sums of their gradients that a rank holds in addition to those of one owner a step."""


class Ring(NamedTuple):
    """Counts of the busiest rank of a ring in a pass.

    Args:
        ranks: number of ranks.
        pairs: query-key pairs.
        read: tokens of other ranks that it reads.
        merged: rows of its queries that are merged, if the keys of each owner are computed apart.
        crosses: True if the ring crosses nodes.
    """

    ranks: int
    pairs: int
    read: int
    merged: int
    crosses: bool


def owners_a_step(ring: Ring, shape: Shape, machine: Machine) -> int:
    """Choose the number of owners with the shortest estimate, of those whose buffers are not too large.

    All ranks must call this with the same arguments.
    """
    others = ring.ranks - 1
    if others < 2 or not ring.read:
        return 1
    fitting = range(1, 1 + most_owners(others, ring.read / others, shape))
    return min(fitting, key=lambda count: (_seconds(count, ring, shape, machine), count))


def most_owners(others: int, tokens: float, shape: Shape) -> int:
    """Number of owners whose buffers are not too large, of `others` with so many tokens each.

    For each further owner there are the keys of a step and of the next, and the sums of a step, of the step before and
    those that arrive.
    """
    size, total = shape.dtype.itemsize, accumulation_dtype(shape.dtype).itemsize
    further = tokens * shape.key_value_numbers * (2 * size + 3 * total)
    return min(others, 1 + int(MOST_BYTES // further))


def _seconds(count: int, ring: Ring, shape: Shape, machine: Machine) -> float:
    """Estimate the seconds of both passes that depend on the number of owners."""
    others, size = ring.ranks - 1, shape.dtype.itemsize
    steps = -(-others // count)
    share = ring.read / others * shape.key_value_numbers
    merging = merged_bytes(shape, ring.merged * steps / others, shape.heads) / machine.memory
    latency = machine.node_latency if ring.crosses else machine.latency
    # Keys of the first step travel while own keys are computed with. Sums of the last one travel at the end.
    own = attention_flops(ring.pairs, shape.heads, shape.query_dim, shape.value_dim) / ring.ranks
    first = _travel(share * count * size, ring, machine)
    shown = max(0.0, first - own / machine.forward) + max(0.0, first - BACKWARD * own / machine.backward)
    last = others - (steps - 1) * count
    shown += _travel(share * last * accumulation_dtype(shape.dtype).itemsize, ring, machine)
    return merging + steps * (2 * machine.launch + 3 * latency) + machine.overlap * shown


def _travel(sent: float, ring: Ring, machine: Machine) -> float:
    return sent / (machine.node_bandwidth if ring.crosses else machine.bandwidth)


def merged_bytes(shape: Shape, rows: float, heads: int) -> float:
    """Bytes read and written to merge rows of outputs, and to add rows to the gradients of queries.

    A part and a sum are read, and the sum is written.
    """
    size, sums = shape.dtype.itemsize, accumulation_dtype(shape.dtype).itemsize
    return rows * heads * (shape.value_dim + shape.query_dim) * (size + 2 * sums)
