"""Samples of a global batch dealt to groups of different sizes: dynamic context parallelism.

Arithmetic alone: no process group, no tensor on a device. Every rank makes the same schedule from the same lengths.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from .balance import padded_layout
from .cost import BACKWARD, Machine, attention_flops
from .greedy import GreedyGroup, greedy_stages
from .layout import FIXED_LAYOUTS, Layout

KERNELS_A_LAYER = 36
"""Kernel calls of a decoder layer, forward and backward, beside attention's."""
KERNELS_A_STEP = 6
"""Kernel calls of a ring's step in a layer, forward and backward: a tile, its merge and its gradients."""


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

    def sample(self, length: int, size: int) -> float:
        """What a sample adds to each rank of a group, at most: as if it were alone there."""
        pairs = length * (length + 1) / 2 / size
        return self.token * length / size + self._attention(pairs, length * (size - 1) / size, size)

    def group(self, size: int) -> float:
        """What a run takes in a group of `size`, whatever it holds."""
        return self.run + (size - 1) * self.step

    def row(self, lengths: Sequence[int], layout: Layout) -> float:
        """What a run takes on the rank that needs longest, for documents packed to one causal row.

        Args:
            layout: of the row, padded to equal shares.
        """
        linear = max(self.least, self.token * layout.length / layout.size)
        ranks = zip(*counts(lengths, layout))
        attention = max(self._attention(pairs, keys, layout.size) for pairs, keys in ranks)
        return self.group(layout.size) + linear + attention

    def _attention(self, pairs: float, keys: float, size: int) -> float:
        computed, moved = self.pair * pairs, (self.key if size <= self.node else self.far_key) * keys
        return max(computed, moved) + (1 - self.overlap) * min(computed, moved)


def counts(lengths: Sequence[int], layout: Layout) -> tuple[list[int], list[int]]:
    """For each rank, the query-key pairs that it computes and the tokens whose keys it gets from others: causal
    documents packed to one row."""
    if layout.size == 1:
        return [sum(length * (length + 1) // 2 for length in lengths)], [0]
    starts = list(accumulate(lengths, initial=0))
    before = list(accumulate((length * (length + 1) // 2 for length in lengths), initial=0))
    pairs, keys, read_until = ([0] * layout.size for _ in range(3))
    end = computed = 0
    for rank, bound in zip(layout.chunk_owners, layout.bounds[1:]):
        start, end = end, min(bound, starts[-1])
        if start == end:
            break
        # A chunk reads from its first token's document's start on, unless the rank's earlier chunk has read that.
        document = bisect_right(starts, start) - 1
        keys[rank] += start - max(starts[document], min(read_until[rank], start))
        read_until[rank] = end
        document = bisect_right(starts, end) - 1
        inside = end - starts[document]
        pairs[rank] += before[document] + inside * (inside + 1) // 2 - computed
        computed = before[document] + inside * (inside + 1) // 2
    return pairs, keys


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
        rounds: in each, groups that make up all ranks. Every rank runs the model once a round.
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
        work = np.zeros((len(self.rounds), self.ranks))
        for number, groups in enumerate(self.rounds):
            for group in groups:
                if group.samples:
                    work[number, group.first : group.first + group.size] = _row_cost(
                        [self.lengths[sample] for sample in group.samples], group.size, self.costs, self.layout
                    )
        return work

    @cached_property
    def total(self) -> float:
        """What all rounds take, with waiting."""
        if self.costs.in_step:
            return float(self.work.max(axis=1).sum())
        done = np.zeros(self.ranks)
        for groups, work in zip(self.rounds, self.work):
            for first, size, _ in groups:
                done[first : first + size] = done[first : first + size].max() + work[first]
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

    A sample gets the smallest group that holds it, or a larger one where that takes less time in all. Groups with
    several samples run them as documents of one row. By the estimate it is never slower than static CP or the greedy
    rule of `greedy.py`.

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
    smallest = [next(size for size in holds if length <= holds[size]) for length in lengths]
    # A long sample is done sooner in a larger group than it needs. How long is too long? Try the times that the
    # longest takes in each, and no time, which puts everything into the largest groups.
    limits = sorted({costs.sample(lengths[longest], size) for size in holds} | {0.0}, reverse=True)
    others = [in_order(lengths, ranks, extent, room, costs, layout) for room in (0, holds[extent])]
    stages = greedy_stages(lengths, smallest, ranks, list(holds))
    others.append(Schedule(tuple(lengths), ranks, _in_rounds(stages, ranks), costs, layout))
    best = min(others, key=lambda schedule: schedule.total)
    tried = set()
    for limit in limits:
        chosen = tuple(
            next(
                (size for size in holds if size >= least and costs.sample(length, size) <= limit * (1 + 1e-9)), extent
            )
            for length, least in zip(lengths, smallest)
        )
        if chosen in tried:
            continue
        tried.add(chosen)
        ways = [_Dealer(lengths, chosen, ranks, holds, costs, layout, packed).deal for packed in (True, False)]
        if not costs.in_step:
            ways.append(partial(_one_after_another, lengths, chosen, ranks, costs, layout))
        for way in ways:
            rounds = way()
            schedule = Schedule(tuple(lengths), ranks, rounds, costs, layout)
            if schedule.total < best.total * (1 - 1e-9):
                best = schedule
    return best


def in_order(
    lengths: Sequence[int], ranks: int, extent: int, most: int, costs: Costs, layout: str = "zigzag"
) -> Schedule:
    """What static CP does: groups of `extent` ranks take turns in taking the next sample.

    Args:
        most: the tokens that a row may have. A sample that is longer than what is left begins a new one; with 0, each
            is alone.
    """
    rows: list[list[list[int]]] = [[] for _ in range(ranks // extent)]
    for sample, length in enumerate(lengths):
        own = rows[sample % len(rows)]
        if not own or sum(lengths[other] for other in own[-1]) + length > most:
            own.append([])
        own[-1].append(sample)
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


def _row_cost(lengths: list[int], size: int, costs: Costs, layout: str) -> float:
    return costs.row(lengths, padded_layout(layout, sum(lengths), size))


def _one_after_another(
    lengths: Sequence[int], chosen: Sequence[int], ranks: int, costs: Costs, layout: str
) -> tuple[tuple[Group, ...], ...]:
    """Each sample by itself, the largest groups first, on the ranks that are free soonest: some run more often."""
    done, runs = np.zeros(ranks), np.zeros(ranks, dtype=np.int64)
    rounds: list[list[Group]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: (-chosen[sample], -lengths[sample], sample)):
        size = chosen[sample]
        block = int(done.reshape(-1, size).max(axis=1).argmin())
        group = slice(block * size, (block + 1) * size)
        done[group] = done[group].max() + _row_cost([lengths[sample]], size, costs, layout)
        turn = runs[group].max()
        runs[group] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(Group(group.start, size, (sample,)))
    for groups in rounds:
        busy = {rank for first, size, _ in groups for rank in range(first, first + size)}
        groups += [Group(rank, 1, ()) for rank in range(ranks) if rank not in busy]
    return tuple(tuple(sorted(groups)) for groups in rounds)


def _in_rounds(stages: Sequence[Sequence[GreedyGroup]], ranks: int) -> tuple[tuple[Group, ...], ...]:
    """A round for each of the samples that the groups of a stage run one after another."""
    rounds = []
    for stage in stages:
        placed, first = [], 0
        for group in sorted(stage, key=lambda group: -group.size):
            placed.append((first, group))
            first += group.size
        idle = [Group(rank, 1, ()) for rank in range(first, ranks)]
        for turn in range(max(len(group.samples) for group in stage)):
            rounds.append(
                (*(Group(at, group.size, tuple(group.samples[turn : turn + 1])) for at, group in placed), *idle)
            )
    return tuple(rounds)


class _Dealer:
    """Deals samples whose least sizes are chosen, the largest groups first and of these the longest samples first.

    A sample goes where the slowest of a round gets slower by the least: to a group of its size or a larger one that
    has room, or to a new one of its size. Since each size divides the
    larger ones, there is always a place for them that begins at a multiple of their size.

    Args:
        chosen: the least size for each sample.
        holds: the tokens that a row has room for, by size.
        packed: whether groups of several ranks may hold several samples. Their ranks' shares of a causal mask are not
            the same then.
    """

    def __init__(self, lengths, chosen, ranks, holds, costs, layout, packed):
        self._lengths, self._chosen, self._ranks, self._holds = lengths, chosen, ranks, holds
        self._costs, self._layout, self._packed = costs, layout, packed
        self._sizes = list(holds)
        self._used: list[int] = []
        """For each round, the ranks that have a group."""
        self._groups: list[list[tuple[int, list[int]]]] = []
        """For each round, its groups' sizes and samples."""
        self._places = _Places()

    def deal(self) -> tuple[tuple[Group, ...], ...]:
        for size in sorted(set(self._chosen), reverse=True):
            samples = [sample for sample, wanted in enumerate(self._chosen) if wanted == size]
            self._deal_size(size, sorted(samples, key=lambda sample: (-self._lengths[sample], sample)))
        done = np.zeros(self._ranks)
        return tuple(self._laid_out(self._grown(groups), done) for groups in self._groups)

    def _deal_size(self, size: int, samples: list[int]) -> None:
        places, kind = self._places, self._sizes.index(size)
        new = {number: self._place_for_new(number, kind) for number in range(len(self._used))}
        for sample in samples:
            length = self._lengths[sample]
            costs = np.array([self._costs.sample(length, size) for size in self._sizes])
            place = places.best(length, costs)
            if place is None:
                number = len(self._used)
                self._used.append(0)
                self._groups.append([])
                places.slowest.append(0.0)
                place = new[number] = self._place_for_new(number, kind)
            number = int(places.rounds[place])
            if places.samples[place] is None:
                members: list[int] = []
                self._groups[number].append((size, members))
                self._used[number] += size
                places.samples[place] = members
                new[number] = self._place_for_new(number, kind)
            places.take(place, sample, length, costs)
            if not self._packed and size > 1:
                places.close(place)
        for place in new.values():
            if place is not None:
                places.close(place)

    def _place_for_new(self, number: int, kind: int) -> int | None:
        """A place for a new group in a round, if there are ranks for it."""
        size = self._sizes[kind]
        if self._used[number] + size > self._ranks:
            return None
        return self._places.add(number, kind, self._costs.group(size), self._holds[size])

    def _grown(self, groups: list[tuple[int, list[int]]]) -> list[tuple[float, int, list[int]]]:
        """What a round's groups take, their sizes and samples; the slowest on more ranks where some would be idle and
        it helps."""
        free = self._ranks - sum(size for size, _ in groups)
        larger = dict(zip(self._sizes, self._sizes[1:]))
        timed = [(self._cost(size, samples), size, samples) for size, samples in groups]
        while free:
            slowest = max(range(len(timed)), key=lambda number: timed[number][0])
            cost, size, samples = timed[slowest]
            if size not in larger or larger[size] - size > free:
                break
            grown = self._cost(larger[size], samples)
            if grown >= cost:
                break
            timed[slowest] = grown, larger[size], samples
            free -= larger[size] - size
        return timed

    def _laid_out(self, groups: list[tuple[float, int, list[int]]], done: np.ndarray) -> tuple[Group, ...]:
        """A round's groups on ranks: the larger first, and of these the slowest on the ranks that have done least.

        Args:
            done: `[ranks]`, what each has done before; brought up to date.
        """
        taken = np.zeros(self._ranks, dtype=bool)
        laid = []
        for size in sorted({size for _, size, _ in groups}, reverse=True):
            blocks = np.where(taken.reshape(-1, size).any(axis=1), np.inf, done.reshape(-1, size).max(axis=1))
            alike = sorted((group for group in groups if group[1] == size), key=lambda group: -group[0])
            for block, (cost, _, samples) in zip(blocks.argsort(kind="stable").tolist(), alike):
                ranks = slice(block * size, (block + 1) * size)
                taken[ranks] = True
                done[ranks] = done[ranks].max() + cost
                laid.append(Group(ranks.start, size, tuple(samples)))
        laid += [Group(rank, 1, ()) for rank in np.flatnonzero(~taken).tolist()]
        return tuple(sorted(laid))

    def _cost(self, size: int, samples: list[int]) -> float:
        return _row_cost([self._lengths[sample] for sample in samples], size, self._costs, self._layout)


class _Places:
    """Where a sample may go: groups, and in each round a new one. Arrays, since there are ranks times rounds of them.

    For each its round, its size (as an index), what it takes less than the slowest of its round, the tokens it has
    room for, and its samples; None for a new group.
    """

    def __init__(self):
        self.rounds, self.kinds, self.room = (np.zeros(64, dtype=np.int64) for _ in range(3))
        self.slack = np.zeros(64)
        self.samples: list[list[int] | None] = []
        self.slowest: list[float] = []
        """For each round, what the slowest group takes."""

    def add(self, number: int, kind: int, cost: float, room: int) -> int:
        place = len(self.samples)
        if place == len(self.rounds):
            for name in ("rounds", "kinds", "room", "slack"):
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros_like(getattr(self, name))]))
        self.rounds[place], self.kinds[place], self.room[place] = number, kind, room
        self.slack[place] = self.slowest[number] - cost
        self.samples.append(None)
        return place

    def best(self, length: int, costs: np.ndarray) -> int | None:
        """The place that holds `length` more and has most to spare then, or is slowest by the least."""
        count = len(self.samples)
        spare = np.where(self.room[:count] >= length, self.slack[:count] - costs[self.kinds[:count]], -np.inf)
        place = int(spare.argmax()) if count else -1
        return None if place < 0 or spare[place] == -np.inf else place

    def close(self, place: int) -> None:
        """Nothing more goes there."""
        self.room[place] = -1

    def take(self, place: int, sample: int, length: int, costs: np.ndarray) -> None:
        """Put a sample there."""
        self.samples[place].append(sample)
        self.room[place] -= length
        self.slack[place] -= costs[self.kinds[place]]
        if self.slack[place] < 0:  # it is the slowest now, and the others of its round have more to spare
            number, slower = self.rounds[place], -self.slack[place]
            self.slowest[number] += slower
            self.slack[self.rounds == number] += slower
