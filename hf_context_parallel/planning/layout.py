"""Where each token lives: positions of a sequence <-> (rank, index on that rank).

A layout cuts a sequence of any length into equal chunks (they differ by one token at most) and deals them to the ranks
of a CP group. It is integer arithmetic: no process group, no tensor on a device.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from .intervals import Interval


@dataclass(frozen=True)
class Layout:
    """How a sequence of `length` tokens is dealt to `size` ranks.

    `chunk_owners` lists, for each chunk in the order of the sequence, the rank that holds it. A rank keeps its chunks
    in that order, so its tokens are sorted by position.
    """

    length: int
    size: int
    chunk_owners: tuple[int, ...]

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """The positions at which chunks begin, and the length."""
        count = len(self.chunk_owners)
        return tuple(index * self.length // count for index in range(count + 1))

    @cached_property
    def chunk_offsets(self) -> tuple[int, ...]:
        """For each chunk, the index of its first token on its rank."""
        filled = [0] * self.size
        offsets = []
        for chunk, rank in enumerate(self.chunk_owners):
            offsets.append(filled[rank])
            filled[rank] += self.bounds[chunk + 1] - self.bounds[chunk]
        return tuple(offsets)

    @cached_property
    def local_lengths(self) -> tuple[int, ...]:
        """How many tokens each rank holds."""
        lengths = [0] * self.size
        for rank, start, stop in zip(self.chunk_owners, self.bounds, self.bounds[1:]):
            lengths[rank] += stop - start
        return tuple(lengths)

    def local_length(self, rank: int) -> int:
        """How many tokens `rank` holds."""
        return self.local_lengths[rank]

    def intervals(self, rank: int) -> list[Interval]:
        """The position ranges `[start, stop)` that `rank` holds, ascending."""
        return [
            (self.bounds[chunk], self.bounds[chunk + 1])
            for chunk, owner in enumerate(self.chunk_owners)
            if owner == rank
        ]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Where the positions `[start, stop)` lie, in order: a rank, an index there, the position, and how many."""
        chunk = bisect_right(self.bounds, start) - 1
        while start < stop:
            end = min(stop, self.bounds[chunk + 1])
            if start < end:  # a chunk may be empty
                index = self.chunk_offsets[chunk] + start - self.bounds[chunk]
                yield self.chunk_owners[chunk], index, start, end - start
            start, chunk = end, chunk + 1

    def owners(self, start: int, stop: int) -> tuple[int, ...]:
        """The ranks that hold the positions `[start, stop)`, a chunk's each."""
        return tuple(rank for rank, *_ in self.pieces(start, stop))

    def positions(self, rank: int) -> torch.Tensor:
        """The positions that `rank` holds, in local order: `[local_length]`."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.intervals(rank)])

    def merged(self, ranks: int) -> Layout:
        """The layout in which every `ranks` neighbouring ranks are one, which holds all their chunks."""
        return Layout(self.length, self.size // ranks, tuple(owner // ranks for owner in self.chunk_owners))

    def restore(self) -> torch.Tensor:
        """For each position, its index in the concatenation of all ranks' tokens: `[length]`."""
        return torch.cat([self.positions(rank) for rank in range(self.size)]).argsort()

    def locate(self, position: int) -> tuple[int, int]:
        """The rank that holds `position`, and its index there."""
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} is outside a sequence of {self.length} tokens")
        ((rank, index, _, _),) = self.pieces(position, position + 1)
        return rank, index


def zigzag(length: int, size: int) -> Layout:
    """2 * size chunks; rank r holds chunks r and 2 * size - 1 - r.

    Under a causal mask an early chunk is cheap and a late one dear; every such pair costs the same, so all ranks have
    the same work (exactly, when 2 * size divides the length).
    """
    ranks = tuple(range(size))
    return Layout(length, size, ranks + ranks[::-1])


def contiguous(length: int, size: int) -> Layout:
    """Rank r holds chunk r of `size`: neighbours stay neighbours, but under a causal mask the last rank works most."""
    return Layout(length, size, tuple(range(size)))


FIXED_LAYOUTS = {"zigzag": zigzag, "contiguous": contiguous}
"""Those that do not depend on documents."""
