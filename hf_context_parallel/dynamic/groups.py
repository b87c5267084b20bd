"""Groups of several sizes, the rounds in which they run, and the time that each rank works in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from ..planning.balanced import fewest_chunks
from .costs import Costs

COUNTED = 2**17
"""Rows times ranks whose costs are computed at a time. It bounds the memory, which is a few hundred bytes for each."""


class Group(NamedTuple):
    """Ranks that run the model together on one row.

    Args:
        first: its first rank.
        size: the number of its ranks, which are consecutive.
        samples: the numbers of the samples in the row. Without samples, the group runs so that others need not wait.
    """

    first: int
    size: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """Assignment of samples to groups of ranks, round by round.

    Args:
        lengths: tokens of each sample.
        ranks: the number of ranks.
        rounds: for each round, the groups in the order of their ranks. The groups of a round hold every rank once, and
            every rank runs the model once a round.
        costs: the costs that the schedule was made for.
        layout: the layout of the rows.
        media: for each sample, the products that towers take for it; see `Costs.rows`.
    """

    lengths: tuple[int, ...]
    ranks: int
    rounds: tuple[tuple[Group, ...], ...]
    costs: Costs
    layout: str = "zigzag"
    media: tuple[tuple[int, int], ...] | None = None

    @cached_property
    def work(self) -> np.ndarray:
        """Estimated time of each run, `[rounds, ranks]`. It is 0 for a group without samples."""
        runs = [(number, group) for number, groups in enumerate(self.rounds) for group in groups if group.samples]
        rows, sizes = [group.samples for _, group in runs], np.array([group.size for _, group in runs])
        media = None if self.media is None else np.array(self.media, dtype=np.float64)
        taken = row_costs(rows, sizes, np.array(self.lengths), self.costs, self.layout, media)
        work = np.zeros((len(self.rounds), self.ranks))
        for (number, (first, size, _)), cost in zip(runs, taken.tolist()):
            work[number, first : first + size] = cost
        return work

    @cached_property
    def total(self) -> float:
        """Estimated time of all rounds, with the time that ranks wait."""
        if self.costs.in_step:
            return float(self.work.max(axis=1).sum())
        done = np.zeros(self.ranks)
        for groups, work in zip(self.rounds, self.work):
            # A group begins when the last of its ranks has finished the round before.
            begins = np.maximum.reduceat(done, [group.first for group in groups])
            done = begins.repeat([group.size for group in groups]) + work
        return float(done.max())

    @property
    def idle(self) -> np.ndarray:
        """Share of the total time that each rank waits, `[ranks]`."""
        return 1 - self.work.sum(axis=0) / self.total


def sizes(extent: int) -> list[int]:
    """List the sizes of groups within `extent` ranks, from 1 to `extent`.

    Each size divides the next. The factors between them are twos first, then larger primes.
    """
    found, factor = [1], 2
    while found[-1] < extent:
        if extent // found[-1] % factor:
            factor += 1
        else:
            found.append(found[-1] * factor)
    return found


def capacity(size: int, max_tokens_per_rank: int, layout: str = "zigzag") -> int:
    """Compute the most tokens of a row on a group of `size` ranks, so that no rank holds more with padding."""
    chunks = fewest_chunks(layout)
    return max_tokens_per_rank // chunks * chunks * size


def row_costs(
    rows: Sequence[Sequence[int]],
    sizes: np.ndarray,
    lengths: np.ndarray,
    costs: Costs,
    layout: str,
    media: np.ndarray | None = None,
) -> np.ndarray:
    """Estimate the cost of each row, `[rows]`.

    Args:
        rows: the samples of each row.
        sizes: the size of the group that runs each row.
        lengths: tokens of each sample.
        costs: the costs of the model on the machine.
        layout: the layout of the rows.
        media: for each sample, the products that towers take for it; see `Costs.rows`.
    """
    taken = np.zeros(len(rows))
    for size in np.unique(sizes).tolist():
        alike, some = np.flatnonzero(sizes == size), max(1, COUNTED // size)
        for numbers in (alike[begin : begin + some] for begin in range(0, len(alike), some)):
            packed = [rows[number] for number in numbers.tolist()]
            samples = np.fromiter(chain.from_iterable(packed), dtype=np.int64)
            own = None if media is None else media[samples]
            taken[numbers] = costs.rows(lengths[samples], np.array(list(map(len, packed))), size, layout, own)
    return taken
