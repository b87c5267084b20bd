"""Packing of samples into rows, the longest first, and assignment of the rows to groups of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .costs import Costs
from .groups import Group, Schedule, row_costs
from .megatron_rule import greedy_stages

LONGER = 1.0, 1.15, 1.35, 1.6, 2.0
"""Limits that are tried for the cost of a sample, as multiples of the average cost of a round with perfect balance.

Real rounds take longer: runs have a fixed cost, rows are uneven, and a few rounds hold the long samples."""
TRIED, BEST = 512, 3
"""With more than `TRIED` samples, every way is tried on about `TRIED` of them, and the `BEST` ways on all samples."""


class _Rows(NamedTuple):
    """Rows of packed samples, and the groups and rounds that run them. Each field but `total` has an entry a row.

    Args:
        samples: the samples of the row, in order.
        sizes: the size of the group that runs the row.
        firsts: the first rank of that group.
        rounds: the number of the round.
        total: the time of all rounds.
    """

    samples: Sequence[list[int]]
    sizes: Sequence[int]
    firsts: Sequence[int]
    rounds: Sequence[int]
    total: float


class Dealer:
    """Packs samples into rows, the longest first, and assigns the rows to groups of ranks.

    Args:
        lengths: tokens of each sample.
        ranks: the number of ranks.
        holds: the tokens that a row has room for, by the size of its group, ascending.
        costs: the costs that the schedule minimises.
        layout: the layout of the rows.
        media: for each sample, the products that towers take for it; see `Costs.rows`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        ranks: int,
        holds: dict[int, int],
        costs: Costs,
        layout: str,
        media: np.ndarray | None = None,
    ):
        self._lengths, self._ranks, self._holds, self._costs, self._layout = lengths, ranks, holds, costs, layout
        self._media = media
        self._alone = {size: costs.sample(lengths, size, media) for size in holds}

    def greedy(self) -> Schedule:
        """Make the schedule of the greedy rule.

        The groups of a stage run their samples one after another, each sample in a round of its own.
        """
        rounds: list[list[Group]] = []
        lengths, smallest = self._lengths.tolist(), self._smallest(np.inf).tolist()
        for stage in greedy_stages(lengths, smallest, self._ranks, list(self._holds)):
            begin, first = len(rounds), 0
            rounds += [[] for _ in range(max(len(group.samples) for group in stage))]
            for group in sorted(stage, key=lambda group: -group.size):
                for number, sample in enumerate(group.samples, start=begin):
                    rounds[number].append(Group(first, group.size, (sample,)))
                first += group.size
        return self._schedule(rounds)

    def fastest(self) -> Schedule:
        """Make the fastest schedule of all ways. Of many samples, a part chooses the ways to try on all."""
        part = self._part()
        distinct = {(rounds, part._smallest(limit).tobytes()): (rounds, limit) for rounds, limit in self._ways()}
        ways = list(distinct.values())
        if part is not self:
            ways = sorted(ways, key=lambda way: part._dealt(*way).total)[:BEST]
        best = min((self._dealt(*way) for way in ways), key=lambda rows: rows.total)
        rounds: list[list[Group]] = [[] for _ in range(max(best.rounds) + 1)]
        for samples, size, first, number in zip(best.samples, best.sizes, best.firsts, best.rounds):
            rounds[number].append(Group(first, size, tuple(samples)))
        return self._schedule(rounds)

    def _schedule(self, rounds: Sequence[Sequence[Group]]) -> Schedule:
        """Make a schedule of rounds. A rank without a group in a round gets a group of its own without samples."""
        idle = [Group(rank, 1, ()) for rank in range(self._ranks)]
        completed = []
        for groups in rounds:
            every: list[Group] = []
            end = 0
            for group in sorted(groups):
                every += [*idle[end : group.first], group]
                end = group.first + group.size
            completed.append((*every, *idle[end:]))
        media = None if self._media is None else tuple((int(a), int(b)) for a, b in self._media)
        lengths = tuple(self._lengths.tolist())
        return Schedule(lengths, self._ranks, tuple(completed), self._costs, self._layout, media)

    def _part(self) -> Dealer:
        """Make a dealer for about `TRIED` of the samples, drawn evenly by length, and proportionally fewer ranks."""
        extent, count = max(self._holds), len(self._lengths)
        ranks = -(-self._ranks * TRIED // (count * extent)) * extent
        if ranks >= self._ranks:
            return self
        tried = count * ranks // self._ranks
        middles = (2 * np.arange(tried) + 1) * count // (2 * tried)
        chosen = self._lengths.argsort(kind="stable")[middles]
        media = None if self._media is None else self._media[chosen]
        return Dealer(self._lengths[chosen], ranks, self._holds, self._costs, self._layout, media)

    def _ways(self) -> list[tuple[int, float]]:
        """List the ways to try: a number of rounds, and the limit for the cost of a sample in its group."""
        # As few rounds as have room for all samples, and a round for each sample.
        limits = [0.0, *(float(taken.max()) for taken in self._alone.values())]
        ways = [(rounds, limit) for rounds in (1, len(self._lengths)) for limit in limits]
        # Numbers of rounds in which all rounds take about equally long.
        least = float(self._alone[1].sum()) / self._ranks
        fewest = -(-int(self._lengths.sum()) // (self._ranks * self._holds[1]))
        more = max(1, fewest // 8)
        rounds = range(fewest, fewest + 4 * more, more)
        return ways + [(number, factor * least / number) for number in rounds for factor in LONGER]

    def _dealt(self, rounds: int, limit: float) -> _Rows:
        rows, sizes = self._packed(rounds, limit)
        return self._alike_together(rows, sizes) if self._costs.in_step else self._where_ranks_are_free(rows, sizes)

    def _smallest(self, limit: float) -> np.ndarray:
        """Choose for each sample the smallest group that holds it at a cost of at most `limit`, else the largest."""
        *smaller, extent = self._holds
        chosen = np.full(len(self._lengths), extent)
        for size in reversed(smaller):
            chosen[(self._lengths <= self._holds[size]) & (self._alone[size] <= limit)] = size
        return chosen

    def _packed(self, rounds: int, limit: float) -> tuple[list[list[int]], np.ndarray]:
        """Pack samples into rows that fill all ranks in `rounds` rounds, or in more if there is no room.

        The longest samples come first. A sample gets a row of its own, on a group of the size that `limit` asks for,
        while there are free ranks. A later sample joins the cheapest row that has room. If no row has room, a round is
        added.

        Returns:
            The samples of each row, and the sizes of their groups.
        """
        lengths, wanted = self._lengths.tolist(), self._smallest(limit).tolist()
        alone = {size: taken.tolist() for size, taken in self._alone.items()}
        rows: list[list[int]] = []
        sizes: list[int] = []
        room: list[int] = []
        open_rows: list[tuple[float, int]] = []  # cost and number of each row
        full_rows: list[tuple[int, float, int]] = []  # (-room, cost, number) of rows too full for now
        free = rounds * self._ranks
        for sample in (-self._lengths).argsort(kind="stable").tolist():
            length, size = lengths[sample], wanted[sample]
            while full_rows and -full_rows[0][0] >= length:
                heappush(open_rows, heappop(full_rows)[1:])
            if free < size:
                while open_rows and room[open_rows[0][1]] < length:
                    taken, row = heappop(open_rows)
                    heappush(full_rows, (-room[row], taken, row))
                if not open_rows:
                    free += self._ranks
            if free >= size:
                free -= size
                heappush(open_rows, (self._costs.group(size) + alone[size][sample], len(rows)))
                rows.append([sample])
                sizes.append(size)
                room.append(self._holds[size] - length)
            else:
                taken, row = open_rows[0]
                heapreplace(open_rows, (taken + alone[sizes[row]][sample], row))
                rows[row].append(sample)
                room[row] -= length
        return rows, np.array(sizes)

    def _alike_together(self, rows: list[list[int]], sizes: np.ndarray) -> _Rows:
        """Put rows of about equal cost in the same round, because all ranks of a round wait for the slowest.

        Rows of the smallest groups are sorted by cost and lie side by side in blocks of the next larger size. These
        blocks are sorted together with the rows of that size, and lie side by side in blocks of the size after it.
        This goes on until a block has all ranks.
        """
        order = sizes.argsort(kind="stable")
        rows, sizes = [rows[number] for number in order.tolist()], sizes[order]
        taken = row_costs(rows, sizes, self._lengths, self._costs, self._layout, self._media)
        slowest = np.zeros(0)  # the cost of each block
        blocks, firsts = np.zeros((2, 0), dtype=np.int64)  # the block of each row, and its first rank in the block
        for size, larger in pairwise([*self._holds, self._ranks]):
            own = taken[sizes == size]
            blocks = np.concatenate([blocks, len(slowest) + np.arange(len(own))])
            firsts = np.concatenate([firsts, np.zeros(len(own), dtype=np.int64)])
            slowest = np.concatenate([slowest, own])
            order, beside = (-slowest).argsort(kind="stable"), larger // size
            places = order.argsort(kind="stable")[blocks]
            blocks, firsts = places // beside, firsts + places % beside * size
            slowest = slowest[order][::beside]
        return _Rows(rows, sizes.tolist(), firsts.tolist(), blocks.tolist(), float(slowest.sum()))

    def _where_ranks_are_free(self, rows: list[list[int]], sizes: np.ndarray) -> _Rows:
        """Run each row on the ranks that are free soonest; rows of large groups come first, then costly rows.

        Rows that a rank runs alone one after another are joined as far as there is room, since a single rank is
        always balanced.
        """
        costs = row_costs(rows, sizes, self._lengths, self._costs, self._layout, self._media)
        lengths = self._lengths.tolist()
        placed = []
        width, free = self._ranks, [(0.0, 0, 0)]  # for blocks of ranks: end time, number, runs so far
        singles: dict[int, tuple[list[int], int]] = {}  # by rank: the last row that it runs alone, and its room
        for number in np.lexsort((-costs, -sizes)).tolist():
            samples, size, cost = rows[number], int(sizes[number]), float(costs[number])
            if size < width:
                parts, width = width // size, size
                free = [(done, block * parts + part, runs) for done, block, runs in free for part in range(parts)]
                heapify(free)
            done, block, runs = free[0]
            if size == 1:
                tokens = sum(lengths[sample] for sample in samples)
                last, room = singles.get(block, ([], 0))
                if tokens <= room:
                    last += samples
                    singles[block] = last, room - tokens
                    heapreplace(free, (done + cost - self._costs.group(1), block, runs))
                    continue
                singles[block] = samples, self._holds[1] - tokens
            heapreplace(free, (done + cost, block, runs + 1))
            placed.append((samples, size, block * size, runs))
        return _Rows(*zip(*placed), max(free)[0])
