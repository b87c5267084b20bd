"""Tiles of queries and keys, and the kernel calls that group them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from .intervals import Interval


class Band(NamedTuple):
    """Limits of the keys that the queries of a tile read.

    In a tile of Q queries and K keys, query i reads key j if j lies at most `left` before and at most `right` after
    key i + K - Q. None means no limit. So the last query is aligned with the last key, as in the `window_size` of
    FlashAttention.

    Example: tiles of 3 queries (down) and 5 keys (across); x is a pair that is computed.

        Band(None, 0), causal    Band(2, 0), a window of 3
        x x x . .                x x x . .
        x x x x .                . x x x .
        x x x x x                . . x x x
    """

    left: int | None
    right: int | None

    def within(self, queries: int, keys: int) -> Band:
        """Band for a tile of this size, without the limits that hide no key from any query."""
        left = None if self.left is None or self.left >= keys - 1 else self.left
        right = None if self.right is None or self.right >= queries - 1 else self.right
        return Band(left, right)


FULL = Band(None, None)
CAUSAL = Band(None, 0)


@dataclass(frozen=True)
class Segments:
    """One kernel call: query range i attends to key range i, with the same band for every i.

    The query ranges ascend and do not overlap, and every query reads a key.
    """

    queries: tuple[Interval, ...]
    keys: tuple[Interval, ...]
    band: Band = FULL

    @cached_property
    def query_runs(self) -> tuple[Interval, ...]:
        """Query ranges, with neighbours joined."""
        return joined(self.queries)

    @cached_property
    def key_runs(self) -> tuple[Interval, ...]:
        """Key ranges in their order, with neighbours joined."""
        return joined(self.keys)

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """Cache in which a kernel keeps data of this call, since every layer makes the same call."""
        return {}

    @property
    def pairs(self) -> int:
        """Number of query-key pairs that the call computes."""
        return sum(pairs_in_band(q[1] - q[0], k[1] - k[0], self.band) for q, k in zip(self.queries, self.keys))


def pairs_in_band(queries: int, keys: int, band: Band) -> int:
    """Count the pairs of a tile that are in its band."""

    def up_to(diagonal: int) -> int:
        """Count the pairs with key <= query + diagonal."""
        first = min(max(0, -diagonal), queries)  # the first query that has a key
        full = min(max(first, keys - 1 - diagonal), queries)  # the first query that has all keys
        return (full - first) * (first + full + 2 * diagonal + 1) // 2 + (queries - full) * keys

    above = queries * keys if band.right is None else up_to(keys - queries + band.right)
    return above - (0 if band.left is None else up_to(keys - queries - band.left - 1))


def joined(intervals: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """Join each interval to the one before it if it begins where that one ends. The order is kept."""
    runs: list[Interval] = []
    for start, stop in intervals:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)


def take(tensor: torch.Tensor, runs: tuple[Interval, ...]) -> torch.Tensor:
    """Concatenate the rows `runs` of `tensor`. One run is returned as a view."""
    if len(runs) == 1:
        return tensor[runs[0][0] : runs[0][1]]
    return torch.cat([tensor[start:stop] for start, stop in runs])
