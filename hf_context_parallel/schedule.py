"""Samples of a global batch dealt to groups of different sizes: dynamic context parallelism.

Arithmetic alone: no process group, no tensor on a device. Every rank makes the same schedule from the same lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np

from .greedy import greedy_stages
from .planning.layout import FIXED_LAYOUTS
from .planning.machine import BACKWARD, Machine, attention_flops

KERNELS_A_LAYER = 36
"""Kernel calls of a decoder layer, forward and backward, beside attention's."""
KERNELS_A_STEP = 6
"""Kernel calls of a ring's step in a layer, forward and backward: a tile, its merge and its gradients."""
LONGER = 1.0, 1.15, 1.35, 1.6, 2.0
"""How long a sample may take, as multiples of the least that a round could take on average; all are tried. Rounds take
longer than that: runs cost something, rows are uneven, and long samples come together in a few rounds."""
TRIED, BEST = 512, 3
"""Where there are more samples, about so many are dealt in all ways, and all samples in so many of the best ways."""
COUNTED = 2**17
"""Rows times ranks whose work is counted at a time: this bounds the memory for it, to a few hundred bytes for each."""


class ModelShape(NamedTuple):
    """What of a model decides what a token costs.

    Args:
        layers: decoder layers.
        heads, key_heads, head_dim: of attention.
        parameters: that a token meets, without embeddings.
        itemsize: bytes of a number in weights and keys.
    """

    layers: int
    heads: int
    key_heads: int
    head_dim: int
    parameters: int
    itemsize: int = 2


LLAMA_8B = ModelShape(layers=32, heads=32, key_heads=8, head_dim=128, parameters=7_500_000_000)


@dataclass(frozen=True)
class Costs:
    """What a rank spends on a run of the model, forward and backward: in seconds, or in any other unit of work.

    Args:
        pair: for a query and a key that it reads.
        token: for a token, apart from attention.
        least: for all of a run's tokens together, however few (weights are read, or gathered, for them).
        run: for a run, whatever it holds.
        step: for each other rank of its group.
        key: for a token's keys to arrive and their gradients to leave, while pairs are computed.
        far_key: the same in groups that are larger than a node.
        node: ranks of a node.
        overlap: the share of the shorter of computing pairs and moving keys that is hidden.
        in_step: whether all ranks wait for each other in every run, as they do where weights are gathered for it, or
            for the ranks of their group alone.
    """

    pair: float
    token: float
    least: float = 0.0
    run: float = 0.0
    step: float = 0.0
    key: float = 0.0
    far_key: float = 0.0
    node: int = 8
    overlap: float = 1.0
    in_step: bool = False

    @classmethod
    def of(cls, shape: ModelShape, machine: Machine, sharded: bool = False) -> Costs:
        """A model's costs on a machine.

        Args:
            sharded: whether weights are gathered for each run, in forward and in backward, from the ranks of a node.
        """
        weights = shape.parameters * shape.itemsize
        numbers = 2 * shape.key_heads * shape.head_dim  # of a token's keys and values
        # Those travel in forward and in backward, and their gradients in float32 or what is wider.
        sent = shape.layers * numbers * (2 * shape.itemsize + max(shape.itemsize, 4))
        read = 3 * weights / machine.memory
        gathered = 2 * weights * (1 - 1 / machine.node) / machine.bandwidth
        return cls(
            pair=shape.layers
            * (1 + BACKWARD)
            * attention_flops(1, shape.heads, shape.head_dim, shape.head_dim)
            / machine.attention,
            token=6 * shape.parameters / machine.linear,
            least=max(read, gathered) if sharded else read,
            run=shape.layers * KERNELS_A_LAYER * machine.launch,
            step=shape.layers * (KERNELS_A_STEP * machine.launch + 2 * machine.latency),
            key=sent / machine.bandwidth,
            far_key=sent / machine.node_bandwidth,
            node=machine.node,
            overlap=machine.overlap,
            in_step=sharded,
        )

    def sample(self, lengths: np.ndarray, size: int) -> np.ndarray:
        """What each sample adds to every rank of a group, at most: as if it were alone there."""
        pairs = lengths * (lengths + 1) / 2 / size
        return self.token * lengths / size + self._attention(pairs, lengths * (size - 1) / size, size)

    def group(self, size: int) -> float:
        """What a run takes in a group of `size`, whatever it holds."""
        return self.run + (size - 1) * self.step

    def rows(self, lengths: np.ndarray, documents: np.ndarray, size: int, layout: str = "zigzag") -> np.ndarray:
        """`[rows]`: what a run of each takes on the rank that needs longest. Arguments are those of `counts`."""
        tokens = np.diff(_edges(lengths)[_edges(documents)])
        chunks = len(FIXED_LAYOUTS[layout](0, size).chunk_owners)
        linear = np.maximum(self.least, self.token * (-(-tokens // chunks) * chunks) / size)
        attention = self._attention(*counts(lengths, documents, size, layout), size).max(axis=1)
        return self.group(size) + linear + attention

    def _attention(self, pairs: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
        computed, moved = self.pair * pairs, (self.key if size <= self.node else self.far_key) * keys
        return np.maximum(computed, moved) + (1 - self.overlap) * np.minimum(computed, moved)


def counts(
    lengths: np.ndarray, documents: np.ndarray, size: int, layout: str = "zigzag"
) -> tuple[np.ndarray, np.ndarray]:
    """`[rows, size]`: the query-key pairs that each rank computes, and the tokens whose keys it gets from others.

    Rows are causal documents, packed, and padded to equal shares.

    Args:
        lengths: tokens of all documents, one row's after another's.
        documents: how many each row has.
        size: ranks that each row is dealt to.
    """
    owners = np.array(FIXED_LAYOUTS[layout](0, size).chunk_owners)
    chunks = owners.argsort(kind="stable").reshape(size, -1)  # of each rank, in the order of the row
    # Positions count on from row to row: a row ends where the next one's document begins, and has read nothing of it.
    starts, before = _edges(lengths), _edges(lengths * (lengths + 1) // 2)
    edges = starts[_edges(documents)][:, None]
    begins, ends = edges[:-1], edges[1:]
    share = -(-(ends - begins) // len(owners))
    bounds = np.minimum(begins + share * np.arange(len(owners) + 1), ends)
    document = starts.searchsorted(bounds, side="right") - 1
    inside = bounds - starts[document]
    computed = before[document] + inside * (inside + 1) // 2
    pairs = (computed[:, chunks + 1] - computed[:, chunks]).sum(axis=2)
    # A chunk reads from its first token's document's start on, unless the rank's earlier chunk has read that.
    read = np.concatenate([begins[:, :, None].repeat(size, axis=1), bounds[:, chunks[:, :-1] + 1]], axis=2)
    keys = (bounds[:, chunks] - np.maximum(starts[document[:, chunks]], read)).sum(axis=2)
    return pairs, keys


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Where ranges begin that follow each other from 0 on, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)])


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
        taken = _row_costs(rows, sizes, np.array(self.lengths), self.costs, self.layout)
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
    estimate it is never slower than static CP or the greedy rule of `greedy.py`.

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
    dealer = _Dealer(np.array(lengths), ranks, holds, costs, layout)
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


def capacity(size: int, max_tokens_per_rank: int, layout: str = "zigzag") -> int:
    """The tokens that a row of a group may have, so that with padding no rank holds more than it may."""
    chunks = len(FIXED_LAYOUTS[layout](0, 1).chunk_owners)
    return max_tokens_per_rank // chunks * chunks * size


def _row_costs(
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


class _Dealer:
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

    def _part(self) -> _Dealer:
        """The same for about `TRIED` of the samples, evenly from short to long, and as many fewer ranks."""
        extent, count = max(self._holds), len(self._lengths)
        ranks = -(-self._ranks * TRIED // (count * extent)) * extent
        if ranks >= self._ranks:
            return self
        tried = count * ranks // self._ranks
        middles = (2 * np.arange(tried) + 1) * count // (2 * tried)
        return _Dealer(np.sort(self._lengths)[middles], ranks, self._holds, self._costs, self._layout)

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
        taken = _row_costs(rows, sizes, self._lengths, self._costs, self._layout)
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
        costs = _row_costs(rows, sizes, self._lengths, self._costs, self._layout)
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
