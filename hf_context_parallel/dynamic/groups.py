"""Groups of several sizes, the rounds in which they run, and what each rank does in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from ..planning.layout import FIXED_LAYOUTS
from .costs import Costs

COUNTED = 2**17
"""Rows times ranks whose work is counted at a time: this bounds the memory for it, to a few hundred bytes for each."""


class Group(NamedTuple):
    """Ranks that run the model together on one row.

    Args:
        first, size: its ranks are `size` from `first` on.
        samples: the numbers of those that are packed to the row; none if the run is for the others' sake.
    """

    first: int
    size: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """Who computes what, and when.

    Args:
        lengths: tokens of each sample.
        ranks: how many there are.
        rounds: in each, groups that make up all ranks, in their order. Every rank runs the model once a round.
        costs: what it was made for.
        layout: of rows.
    """

    lengths: tuple[int, ...]
    ranks: int
    rounds: tuple[tuple[Group, ...], ...]
    costs: Costs
    layout: str = "zigzag"

    @cached_property
    def work(self) -> np.ndarray:
        """`[rounds, ranks]`: what each run takes, by the costs. Ranks without samples do nothing of use."""
        runs = [(number, group) for number, groups in enumerate(self.rounds) for group in groups if group.samples]
        rows, sizes = [group.samples for _, group in runs], np.array([group.size for _, group in runs])
        taken = row_costs(rows, sizes, np.array(self.lengths), self.costs, self.layout)
        work = np.zeros((len(self.rounds), self.ranks))
        for (number, (first, size, _)), cost in zip(runs, taken.tolist()):
            work[number, first : first + size] = cost
        return work

    @cached_property
    def total(self) -> float:
        """What all rounds take, with waiting."""
        if self.costs.in_step:
            return float(self.work.max(axis=1).sum())
        done = np.zeros(self.ranks)
        for groups, work in zip(self.rounds, self.work):
            # A group begins when the last of its ranks is done with the round before.
            begins = np.maximum.reduceat(done, [group.first for group in groups])
            done = begins.repeat([group.size for group in groups]) + work
        return float(done.max())

    @property
    def idle(self) -> np.ndarray:
        """`[ranks]`: the share of the total for which each rank waits."""
        return 1 - self.work.sum(axis=0) / self.total


def sizes(extent: int) -> list[int]:
    """The sizes of groups among `extent` ranks: each divides the next; by powers of two first, then other factors."""
    found, factor = [1], 2
    while found[-1] < extent:
        if extent // found[-1] % factor:
            factor += 1
        else:
            found.append(found[-1] * factor)
    return found


def capacity(size: int, max_tokens_per_rank: int, layout: str = "zigzag") -> int:
    """The tokens that a row of a group may have, so that with padding no rank holds more than it may."""
    chunks = len(FIXED_LAYOUTS[layout](0, 1).chunk_owners)
    return max_tokens_per_rank // chunks * chunks * size


def row_costs(
    rows: Sequence[Sequence[int]], sizes: np.ndarray, lengths: np.ndarray, costs: Costs, layout: str
) -> np.ndarray:
    """What each row takes.

    Args:
        rows: the samples of each.
        sizes: of the groups that run them.
        lengths: of samples.
    """
    taken = np.zeros(len(rows))
    for size in np.unique(sizes).tolist():
        alike, some = np.flatnonzero(sizes == size), max(1, COUNTED // size)
        for numbers in (alike[begin : begin + some] for begin in range(0, len(alike), some)):
            packed = [rows[number] for number in numbers.tolist()]
            samples = np.fromiter(chain.from_iterable(packed), dtype=np.int64)
            taken[numbers] = costs.rows(lengths[samples], np.array(list(map(len, packed))), size, layout)
    return taken
