"""A greedy rule for groups of different sizes: what Megatron-LM's hybrid context parallelism schedules.

Written after what its source does (`megatron/core/pipeline_parallel/hybrid_cp_schedule.py`, 2025). A sample gets the
smallest power of two of ranks that holds it and counts as s^2 / ranks. Samples go, longest first, to ranks that have
nothing yet, or else to the group of their size that has least. When groups are even to within 5%, or no sample can be
placed, the next stage begins. Groups grow to ranks that have nothing. In a stage a group runs its samples one after
another.

It is one of the ways that `schedule.make_schedule` tries, and what `benchmarks/dynamic.py` compares with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappush, heapreplace
from itertools import pairwise

SLACK = 0.05


@dataclass
class GreedyGroup:
    """Ranks of a stage, and the numbers of the samples that they run one after another."""

    size: int
    samples: list[int] = field(default_factory=list)
    load: float = 0.0


def greedy_stages(
    lengths: Sequence[int], chosen: Sequence[int], ranks: int, sizes: Sequence[int]
) -> list[list[GreedyGroup]]:
    """The stages for samples of these lengths.

    Args:
        chosen: for each sample, the size of its group.
        sizes: that groups may grow to, ascending, each a divisor of the next and of `ranks`.
    """
    waiting = sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))
    work = [length**2 / size for length, size in zip(lengths, chosen)]
    stages = []
    while waiting:
        groups, waiting = _Stage(work, chosen, ranks, sizes).fill(waiting)
        stages.append(groups)
    return stages


class _Stage:
    def __init__(self, work: Sequence[float], chosen: Sequence[int], ranks: int, sizes: Sequence[int]):
        self._work, self._chosen, self._sizes, self._free = work, chosen, sizes, ranks
        self._groups: list[GreedyGroup] = []
        self._by_size: dict[int, list[tuple[float, int]]] = {}
        """For each size, a heap of its groups' loads and numbers."""
        self._most = 0.0

    def fill(self, waiting: list[int]) -> tuple[list[GreedyGroup], list[int]]:
        """The groups of one stage, and the samples that are left."""
        buckets = self._buckets(waiting)
        largest, smaller_came = self._chosen[waiting[0]], False
        while any(buckets):
            bucket = next((bucket for bucket in buckets if bucket and self._placeable(bucket[0])), None)
            if bucket is None:
                break
            sample = bucket.popleft()
            self._place(sample)
            smaller_came = smaller_came or self._chosen[sample] < largest
            if smaller_came and any(buckets) and _even(self._least(), self._most):
                break
        left = [sample for bucket in buckets for sample in bucket]
        left += self._trimmed()
        self._grow()
        return self._groups, left

    def _buckets(self, waiting: list[int]) -> list[deque[int]]:
        """The samples in as many runs of about equal work as there are sizes."""
        wanted = len({self._chosen[sample] for sample in waiting})
        target = sum(self._work[sample] for sample in waiting) / wanted
        buckets, work, left = [deque()], 0.0, wanted
        for number, sample in enumerate(waiting):
            if buckets[-1] and (
                work + self._work[sample] > 1.1 * target or len(waiting) - number <= left - len(buckets) + 1
            ):
                buckets.append(deque())
                work, left = 0.0, left - 1
            buckets[-1].append(sample)
            work += self._work[sample]
        return buckets

    def _placeable(self, sample: int) -> bool:
        return self._free >= self._chosen[sample] or self._chosen[sample] in self._by_size

    def _place(self, sample: int) -> None:
        size = self._chosen[sample]
        if self._free >= size:
            self._free -= size
            heappush(self._by_size.setdefault(size, []), (0.0, len(self._groups)))
            # It has the least load of its size, since work is more than none.
            self._groups.append(GreedyGroup(size))
        _, number = self._by_size[size][0]
        group = self._groups[number]
        group.samples.append(sample)
        group.load += self._work[sample]
        heapreplace(self._by_size[size], (group.load, number))
        self._most = max(self._most, group.load)

    def _least(self) -> float:
        """The least load; ranks without a group have none."""
        return 0.0 if self._free else min(heap[0][0] for heap in self._by_size.values())

    def _trimmed(self) -> list[int]:
        """Samples that are taken off again, since the groups are more even without them."""
        taken: list[int] = []
        least, heap = self._least(), [(-group.load, number) for number, group in enumerate(self._groups)]
        heapify(heap)
        while least > 0 and not _even(least, -heap[0][0]):
            most, group = -heap[0][0], self._groups[heap[0][1]]
            if len(group.samples) < 2:
                break
            load = most - self._work[group.samples[-1]]
            heapreplace(heap, (-load, heap[0][1]))
            if -heap[0][0] - min(least, load) >= most - least:
                break
            group.load, least = load, min(least, load)
            taken.append(group.samples.pop())
        return taken

    def _grow(self) -> None:
        """The smallest groups first, to ranks that have nothing."""
        for size, larger in pairwise(self._sizes):
            for group in self._groups:
                if group.size == size and larger - size <= self._free:
                    group.size = larger
                    self._free -= larger - size


def _even(least: float, most: float) -> bool:
    return most - least <= SLACK * most
