"""Sets of integers as sorted, disjoint, non-touching half-open intervals `[start, stop)`."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Sort the intervals, join those that touch or overlap, and leave out empty ones."""
    joined: list[Interval] = []
    for start, stop in sorted(intervals):
        if start >= stop:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def intersection(left: list[Interval], right: list[Interval]) -> list[Interval]:
    """Integers that are in both sets."""
    common, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < stop:
            common.append((start, stop))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def difference(left: list[Interval], right: list[Interval]) -> list[Interval]:
    """Integers that are in `left` and not in `right`."""
    if not left:
        return []
    low, high = left[0][0], left[-1][1]
    edges = [low, *(edge for interval in right for edge in interval), high]
    gaps = [(max(low, start), min(high, stop)) for start, stop in zip(edges[::2], edges[1::2])]
    return intersection(left, [gap for gap in gaps if gap[0] < gap[1]])


def near(interval: Interval, intervals: list[Interval]) -> list[Interval]:
    """Select those of sorted intervals that meet or touch an interval."""
    first, last = near_indices(interval, intervals)
    return intervals[first:last]


def near_indices(interval: Interval, intervals: list[Interval]) -> Interval:
    """Return the indices of those of sorted, disjoint intervals that meet or touch an interval."""
    first = bisect_left(intervals, interval[0], key=lambda other: other[1])
    return first, bisect_right(intervals, interval[1], lo=first, key=lambda other: other[0])


def total(intervals: Iterable[Interval]) -> int:
    """Count the integers in disjoint intervals."""
    return sum(stop - start for start, stop in intervals)
