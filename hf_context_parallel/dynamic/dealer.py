"""Packing samples to rows, the longest first, and dealing the rows to groups."""

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
"""How long a sample may take, as multiples of the least that a round could take on average; all are tried. Rounds take
longer than that: runs cost something, rows are uneven, and long samples come together in a few rounds."""
TRIED, BEST = 512, 3
"""Where there are more samples, about so many are dealt in all ways, and all samples in so many of the best ways."""


class _Rows(NamedTuple):
    """Samples packed to rows, and where those run. All but `total` have an entry for each row.

    Args:
        samples: in the order of the row.
        sizes, firsts: of the group, as in `Group`.
        rounds: the number of the round.
        total: what all rounds take.
    """

    samples: Sequence[list[int]]
    sizes: Sequence[int]
    firsts: Sequence[int]
    rounds: Sequence[int]
    total: float


class Dealer:
    """Packs samples to rows, the longest first, and deals those to ranks.

    Args:
        lengths: tokens of each sample.
        holds: the tokens that a row has room for, by the size of its group, ascending.
    """

    def __init__(self, lengths: np.ndarray, ranks: int, holds: dict[int, int], costs: Costs, layout: str):
        self._lengths, self._ranks, self._holds, self._costs, self._layout = lengths, ranks, holds, costs, layout
        self._alone = {size: costs.sample(lengths, size) for size in holds}

    def greedy(self) -> Schedule:
        """The greedy rule's: a round for each of the samples that the groups of a stage run one after another."""
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
        """The fastest of all ways, or of those that are best for a part of many samples."""
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
        """Ranks that have no group in a round run by themselves, on nothing."""
        idle = [Group(rank, 1, ()) for rank in range(self._ranks)]
        completed = []
        for groups in rounds:
            every: list[Group] = []
            end = 0
            for group in sorted(groups):
                every += [*idle[end : group.first], group]
                end = group.first + group.size
            completed.append((*every, *idle[end:]))
        return Schedule(tuple(self._lengths.tolist()), self._ranks, tuple(completed), self._costs, self._layout)

    def _part(self) -> Dealer:
        """The same for about `TRIED` of the samples, evenly from short to long, and as many fewer ranks."""
        extent, count = max(self._holds), len(self._lengths)
        ranks = -(-self._ranks * TRIED // (count * extent)) * extent
        if ranks >= self._ranks:
            return self
        tried = count * ranks // self._ranks
        middles = (2 * np.arange(tried) + 1) * count // (2 * tried)
        return Dealer(np.sort(self._lengths)[middles], ranks, self._holds, self._costs, self._layout)

    def _ways(self) -> list[tuple[int, float]]:
        """Rounds, and how long a sample may take in its group, that are worth a try."""
        # In as few rounds as have room, and each sample by itself.
        limits = [0.0, *(float(taken.max()) for taken in self._alone.values())]
        ways = [(rounds, limit) for rounds in (1, len(self._lengths)) for limit in limits]
        # In so many rounds that take about as long as each other.
        least = float(self._alone[1].sum()) / self._ranks
        fewest = -(-int(self._lengths.sum()) // (self._ranks * self._holds[1]))
        more = max(1, fewest // 8)
        rounds = range(fewest, fewest + 4 * more, more)
        return ways + [(number, factor * least / number) for number in rounds for factor in LONGER]

    def _dealt(self, rounds: int, limit: float) -> _Rows:
        rows, sizes = self._packed(rounds, limit)
        return self._alike_together(rows, sizes) if self._costs.in_step else self._where_ranks_are_free(rows, sizes)

    def _smallest(self, limit: float) -> np.ndarray:
        """For each sample, the smallest size that holds it and where it takes at most `limit`, or the largest."""
        *smaller, extent = self._holds
        chosen = np.full(len(self._lengths), extent)
        for size in reversed(smaller):
            chosen[(self._lengths <= self._holds[size]) & (self._alone[size] <= limit)] = size
        return chosen

    def _packed(self, rounds: int, limit: float) -> tuple[list[list[int]], np.ndarray]:
        """The samples of rows and the sizes of their groups, which make up all ranks in so many rounds, or more.

        Longest first, samples get rows of their own while there are ranks for them, of the size that `limit` asks for.
        The others join the row that takes least of those that have room; if none has, there is one round more.
        """
        lengths, wanted = self._lengths.tolist(), self._smallest(limit).tolist()
        alone = {size: taken.tolist() for size, taken in self._alone.items()}
        rows: list[list[int]] = []
        sizes: list[int] = []
        room: list[int] = []
        open_rows: list[tuple[float, int]] = []  # what they take, and their numbers
        full_rows: list[tuple[int, float, int]] = []  # room, negative, and the same: until samples are short enough
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
        """Rows that take about as long run in the same round, in which all ranks wait for the slowest.

        Those of the smallest size, sorted, lie side by side in blocks of the next size; these, sorted together with
        the rows of that size, in blocks of the next; and so on up to all ranks.
        """
        order = sizes.argsort(kind="stable")
        rows, sizes = [rows[number] for number in order.tolist()], sizes[order]
        taken = row_costs(rows, sizes, self._lengths, self._costs, self._layout)
        slowest = np.zeros(0)  # what each block takes
        blocks, firsts = np.zeros((2, 0), dtype=np.int64)  # each row's block, and its first rank there
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
        """Each row runs on the ranks that are done soonest: the largest first, and of these the slowest.

        What a rank runs by itself one after another is packed as far as there is room: it cannot be uneven.
        """
        costs = row_costs(rows, sizes, self._lengths, self._costs, self._layout)
        lengths = self._lengths.tolist()
        placed = []
        width, free = self._ranks, [(0.0, 0, 0)]  # when blocks of ranks are done, their numbers, and runs so far
        singles: dict[int, tuple[list[int], int]] = {}  # a rank's last row that it runs by itself, and the room there
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
