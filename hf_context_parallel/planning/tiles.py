"""Tiles of queries and keys, and the kernel calls that they are grouped into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from .intervals import Interval


class Band(NamedTuple):
    """Which keys of a tile its queries read: of Q queries and K keys, query i reads key j if it is at most `left`
    before and at most `right` after key i + K - Q. None is no limit.

    The last query is thus aligned with the last key, which is how FlashAttention counts `window_size`.
    """

    left: int | None
    right: int | None

    def within(self, queries: int, keys: int) -> Band:
        """The same for a tile of this size, without the limits that bind none of its queries."""
        left = None if self.left is None or self.left >= keys - 1 else self.left
        right = None if self.right is None or self.right >= queries - 1 else self.right
        return Band(left, right)


FULL = Band(None, None)
CAUSAL = Band(None, 0)


@dataclass(frozen=True)
class Segments:
    """One kernel call: query range i attends to key range i, in a band that is the same for every i.

    The query ranges ascend and do not overlap, and every query reads a key.
    """

    queries: tuple[Interval, ...]
    keys: tuple[Interval, ...]
    band: Band = FULL

    @cached_property
    def query_runs(self) -> tuple[Interval, ...]:
        """The query ranges, with neighbours joined."""
        return joined(self.queries)

    @cached_property
    def key_runs(self) -> tuple[Interval, ...]:
        """The key ranges in order, with neighbours joined."""
        return joined(self.keys)

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What a kernel has made of this call: every layer makes the call again."""
        return {}

    @property
    def pairs(self) -> int:
        """How many query-key pairs are computed."""
        return sum(pairs_in_band(q[1] - q[0], k[1] - k[0], self.band) for q, k in zip(self.queries, self.keys))


def pairs_in_band(queries: int, keys: int, band: Band) -> int:
    """How many pairs of a tile are in its band."""

    def up_to(diagonal: int) -> int:
        """Pairs with key <= query + diagonal."""
        first = min(max(0, -diagonal), queries)  # the first query that has any
        full = min(max(first, keys - 1 - diagonal), queries)  # the first that has all keys
        return (full - first) * (first + full + 2 * diagonal + 1) // 2 + (queries - full) * keys

    above = queries * keys if band.right is None else up_to(keys - queries + band.right)
    return above - (0 if band.left is None else up_to(keys - queries - band.left - 1))


def joined(intervals: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """The intervals in their order, with each that begins where the last one ends joined to it."""
    runs: list[Interval] = []
    for start, stop in intervals:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)


def take(tensor: torch.Tensor, runs: tuple[Interval, ...]) -> torch.Tensor:
    """The rows of `tensor` in `runs`, one after another: a view where there is one run."""
    if len(runs) == 1:
        return tensor[runs[0][0] : runs[0][1]]
    return torch.cat([tensor[start:stop] for start, stop in runs])
