"""A greedy rule for groups of different sizes: what Megatron-LM's hybrid context parallelism schedules.

Written after what its source does (`megatron/core/pipeline_parallel/hybrid_cp_schedule.py`, 2025). A sample gets the
smallest power of two of ranks that holds it and counts as s^2 / ranks. Samples go, longest first, to ranks that have
nothing yet, or else to the group of their size that has least. When groups are even to within 5%, or no sample can be
placed, the next stage begins. Groups grow to ranks that have nothing. In a stage a group runs its samples one after
another.

It is one of the ways that `schedule.make_schedule` tries, and what `benchmarks/dynamic.py` compares with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
        self._work, self._sizes, self._ranks = work, chosen, ranks
        self._larger = dict(zip(sizes, sizes[1:]))
        self._groups: list[GreedyGroup] = []

    def fill(self, waiting: list[int]) -> tuple[list[GreedyGroup], list[int]]:
        """The groups of one stage, and the samples that are left."""
        buckets = self._buckets(waiting)
        largest, smaller_came = self._sizes[waiting[0]], False
        while any(buckets):
            bucket = next((bucket for bucket in buckets if bucket and self._placeable(bucket[0])), None)
            if bucket is None:
                break
            sample = bucket.pop(0)
            self._place(sample)
            smaller_came = smaller_came or self._sizes[sample] < largest
            if smaller_came and any(buckets) and self._even():
                break
        left = [sample for bucket in buckets for sample in bucket]
        left += self._trimmed()
        self._grow()
        return self._groups, left

    def _buckets(self, waiting: list[int]) -> list[list[int]]:
        """The samples in as many runs of about equal work as there are sizes."""
        wanted = len({self._sizes[sample] for sample in waiting})
        target = sum(self._work[sample] for sample in waiting) / wanted
        buckets, work, left = [[]], 0.0, wanted
        for number, sample in enumerate(waiting):
            if buckets[-1] and (
                work + self._work[sample] > 1.1 * target or len(waiting) - number <= left - len(buckets) + 1
            ):
                buckets.append([])
                work, left = 0.0, left - 1
            buckets[-1].append(sample)
            work += self._work[sample]
        return buckets

    def _free(self) -> int:
        return self._ranks - sum(group.size for group in self._groups)

    def _placeable(self, sample: int) -> bool:
        size = self._sizes[sample]
        return self._free() >= size or any(group.size == size for group in self._groups)

    def _place(self, sample: int) -> None:
        size = self._sizes[sample]
        if self._free() >= size:
            group = GreedyGroup(size)
            self._groups.append(group)
        else:
            group = min((group for group in self._groups if group.size == size), key=lambda group: group.load)
        group.samples.append(sample)
        group.load += self._work[sample]

    def _loads(self) -> list[float]:
        return [group.load for group in self._groups] + [0.0] * bool(self._free())

    def _even(self) -> bool:
        loads = self._loads()
        return max(loads) - min(loads) <= SLACK * max(loads)

    def _trimmed(self) -> list[int]:
        """Samples that are taken off again, since the groups are more even without them."""
        taken = []
        while not self._even() and min(self._loads()) > 0:
            slack = max(self._loads()) - min(self._loads())
            group = max(self._groups, key=lambda group: group.load)
            if len(group.samples) < 2:
                break
            work = self._work[group.samples[-1]]
            group.load -= work
            if max(self._loads()) - min(self._loads()) >= slack:
                group.load += work
                break
            taken.append(group.samples.pop())
        return taken

    def _grow(self) -> None:
        while True:
            room = self._free()
            growing = [
                group
                for group in self._groups
                if group.size in self._larger and self._larger[group.size] - group.size <= room
            ]
            if not room or not growing:
                return
            group = min(growing, key=lambda group: group.size)
            group.size = self._larger[group.size]
