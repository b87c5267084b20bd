"""Samples of a global batch dealt to groups of different sizes: dynamic context parallelism.

Arithmetic alone: no process group, no tensor on a device. Every rank makes the same schedule from the same lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .costs import Costs
from .dealer import Dealer
from .groups import Group, Schedule, capacity, sizes


def make_schedule(
    lengths: Sequence[int],
    ranks: int,
    extent: int,
    max_tokens_per_rank: int,
    costs: Costs,
    layout: str = "zigzag",
    names: Sequence[str] | None = None,
) -> Schedule:
    """Deal samples to groups so that the slowest ranks are done soonest.

    A sample gets the smallest group that holds it and in which it does not take too long. How long is too long, and in
    how many rounds all are dealt, is tried. Groups with several samples run them as documents of one row. By the
    estimate it is never slower than static CP or the greedy rule of `megatron_rule.py`.

    Args:
        lengths: tokens of each sample.
        ranks: a multiple of `extent`.
        extent: the largest group. Groups are consecutive ranks that begin at a multiple of their size.
        max_tokens_per_rank: the most that a rank holds of a row, with the layout's padding.
        names: of the samples, for the error.

    Raises:
        ValueError: if a sample fits nowhere, or there is none.
    """
    if not lengths:
        raise ValueError("there are no samples to schedule: a global batch needs at least one.")
    holds = {size: capacity(size, max_tokens_per_rank, layout) for size in sizes(extent)}
    longest = max(range(len(lengths)), key=lambda sample: lengths[sample])
    if lengths[longest] > holds[extent]:
        name = f"sample {longest}" if names is None else names[longest]
        raise ValueError(
            f"{name} has {lengths[longest]} tokens, and a group of all {extent} ranks holds {holds[extent]} with "
            f"max_tokens_per_rank={max_tokens_per_rank}: a sample must fit into one group. Raise max_tokens_per_rank "
            "or size, or cut the sample."
        )
    static = [in_order(lengths, ranks, extent, room, costs, layout) for room in (0, holds[extent])]
    dealer = Dealer(np.array(lengths), ranks, holds, costs, layout)
    return min((dealer.fastest(), dealer.greedy(), *static), key=lambda schedule: schedule.total)


def in_order(
    lengths: Sequence[int], ranks: int, extent: int, most: int, costs: Costs, layout: str = "zigzag"
) -> Schedule:
    """What static CP does: groups of `extent` ranks take turns in taking the next sample.

    Args:
        most: the tokens that a row may have. A sample that is longer than what is left begins a new one; with 0, each
            is alone.
    """
    rows: list[list[list[int]]] = [[] for _ in range(ranks // extent)]
    room = [0] * len(rows)
    for sample, length in enumerate(lengths):
        number = sample % len(rows)
        if not rows[number] or length > room[number]:
            rows[number].append([])
            room[number] = most
        rows[number][-1].append(sample)
        room[number] -= length
    rounds = tuple(
        tuple(
            Group(number * extent, extent, tuple(own[turn]) if turn < len(own) else ())
            for number, own in enumerate(rows)
        )
        for turn in range(max(map(len, rows)))
    )
    return Schedule(tuple(lengths), ranks, rounds, costs, layout)
