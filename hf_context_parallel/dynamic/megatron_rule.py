"""Greedy rule for groups of different sizes, as Megatron-LM's hybrid context parallelism schedules samples.

It follows the behaviour of `megatron/core/pipeline_parallel/hybrid_cp_schedule.py` (2025). A sample of s tokens gets
the smallest power of two of ranks that holds it, and its work counts as s^2 / ranks. Samples are placed longest first:
on ranks without samples if there are enough, else on the group of their size with the least work. When the work of all
groups is equal to within 5%, or no sample can be placed, the next stage begins. At the end of a stage, groups grow to
ranks without samples. Within a stage, a group runs its samples one after another.

`schedule.make_schedule` tries this rule among others, and `benchmarks/dynamic.py` compares with it.
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
    """Group of `size` ranks in a stage, with the samples that it runs one after another and their work."""

    size: int
    samples: list[int] = field(default_factory=list)
    load: float = 0.0


def greedy_stages(
    lengths: Sequence[int], chosen: Sequence[int], ranks: int, sizes: Sequence[int]
) -> list[list[GreedyGroup]]:
    """Split samples into stages, each a list of groups.

    Args:
        lengths: tokens of each sample.
        chosen: for each sample, the size of its group.
        ranks: the number of ranks.
        sizes: the sizes that groups may grow to, ascending. Each divides the next, and all divide `ranks`.
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
        """For each size, a heap of the loads and the numbers of its groups."""
        self._most = 0.0

    def fill(self, waiting: list[int]) -> tuple[list[GreedyGroup], list[int]]:
        """Fill one stage, and return its groups and the samples that are left."""
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
        """Split the samples into as many runs of about equal work as there are sizes."""
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
            # The new group has the least load of its size, since every sample has some work.
            self._groups.append(GreedyGroup(size))
        _, number = self._by_size[size][0]
        group = self._groups[number]
        group.samples.append(sample)
        group.load += self._work[sample]
        heapreplace(self._by_size[size], (group.load, number))
        self._most = max(self._most, group.load)

    def _least(self) -> float:
        """Compute the least load of a rank, which is 0 if a rank has no group."""
        return 0.0 if self._free else min(heap[0][0] for heap in self._by_size.values())

    def _trimmed(self) -> list[int]:
        """Remove samples that make the groups less even, and return them."""
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
        """Let groups grow to ranks without samples, the smallest groups first."""
        for size, larger in pairwise(self._sizes):
            for group in self._groups:
                if group.size == size and larger - size <= self._free:
                    group.size = larger
                    self._free -= larger - size


def _even(least: float, most: float) -> bool:
    return most - least <= SLACK * most
