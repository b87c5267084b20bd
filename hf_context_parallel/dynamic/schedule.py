"""Schedule of dynamic context parallelism: the samples of a global batch dealt to groups of different sizes.

It is arithmetic on the host, without process groups. Every rank makes the same schedule from the same lengths.
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
    media: Sequence[tuple[int, int]] | None = None,
) -> Schedule:
    """Deal samples to groups so that the last rank finishes as early as possible.

    A sample gets the smallest group that holds it at a cost below a limit. Several limits and numbers of rounds are
    tried, and the schedule with the shortest estimated time is taken. A group runs several samples as documents of one
    row. By the estimate, the schedule is never slower than static CP or the greedy rule of `megatron_rule.py`.

    Args:
        lengths: tokens of each sample.
        ranks: the number of ranks, a multiple of `extent`.
        extent: the size of the largest group. A group is consecutive ranks and begins at a multiple of its size.
        max_tokens_per_rank: the most tokens of a row that a rank holds, with the padding of the layout.
        costs: the costs of the model on the machine.
        layout: the layout of the rows.
        names: the names of the samples in errors.
        media: for each sample, the products that towers take for it; see `Costs.rows`.

    Raises:
        ValueError: if there is no sample, or a sample is too long for the largest group.
    """
    if not lengths:
        raise ValueError("there are no samples to schedule. Give at least one.")
    holds = {size: capacity(size, max_tokens_per_rank, layout) for size in sizes(extent)}
    longest = max(range(len(lengths)), key=lambda sample: lengths[sample])
    if lengths[longest] > holds[extent]:
        name = f"sample {longest}" if names is None else names[longest]
        raise ValueError(
            f"{name} has {lengths[longest]} tokens, and a group of all {extent} ranks holds {holds[extent]} with "
            f"max_tokens_per_rank={max_tokens_per_rank}. Raise max_tokens_per_rank or size, or cut the sample."
        )
    static = [in_order(lengths, ranks, extent, room, costs, layout, media) for room in (0, holds[extent])]
    works = None if media is None else np.array(media, dtype=np.float64)
    dealer = Dealer(np.array(lengths), ranks, holds, costs, layout, works)
    return min((dealer.fastest(), dealer.greedy(), *static), key=lambda schedule: schedule.total)


def in_order(
    lengths: Sequence[int],
    ranks: int,
    extent: int,
    most: int,
    costs: Costs,
    layout: str = "zigzag",
    media: Sequence[tuple[int, int]] | None = None,
) -> Schedule:
    """Make the schedule of static CP: groups of `extent` ranks take the samples in turns.

    Args:
        lengths, ranks, extent, costs, layout, media: as for `make_schedule`.
        most: the most tokens of a row. A sample that does not fit into the row of its group begins a new one. With 0,
            each sample has a row of its own.
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
    return Schedule(tuple(lengths), ranks, rounds, costs, layout, None if media is None else tuple(media))
