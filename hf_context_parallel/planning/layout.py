"""Map from positions of a sequence to (rank, index on that rank), and back.

A layout cuts a sequence of any length into equal chunks, which differ by one token at most. It deals the chunks to the
ranks of a CP group. It is integer arithmetic: no process group, no tensor on a device.
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
    """Assignment of a sequence of `length` tokens to `size` ranks.

    `chunk_owners` lists, for each chunk in the order of the sequence, the rank that holds it. A rank keeps its chunks
    in that order, so its tokens are sorted by position.
    """

    length: int
    size: int
    chunk_owners: tuple[int, ...]

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Positions at which chunks begin, and the length of the sequence."""
        count = len(self.chunk_owners)
        return tuple(index * self.length // count for index in range(count + 1))

    @cached_property
    def chunk_offsets(self) -> tuple[int, ...]:
        """Index of the first token of each chunk on the rank that holds it."""
        filled = [0] * self.size
        offsets = []
        for chunk, rank in enumerate(self.chunk_owners):
            offsets.append(filled[rank])
            filled[rank] += self.bounds[chunk + 1] - self.bounds[chunk]
        return tuple(offsets)

    @cached_property
    def local_lengths(self) -> tuple[int, ...]:
        """Number of tokens that each rank holds."""
        lengths = [0] * self.size
        for rank, start, stop in zip(self.chunk_owners, self.bounds, self.bounds[1:]):
            lengths[rank] += stop - start
        return tuple(lengths)

    def local_length(self, rank: int) -> int:
        """Number of tokens that `rank` holds."""
        return self.local_lengths[rank]

    def intervals(self, rank: int) -> list[Interval]:
        """Position ranges `[start, stop)` that `rank` holds, ascending."""
        return [
            (self.bounds[chunk], self.bounds[chunk + 1])
            for chunk, owner in enumerate(self.chunk_owners)
            if owner == rank
        ]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (rank, index on it, position, number of tokens) for each stretch of `[start, stop)`, in order."""
        chunk = bisect_right(self.bounds, start) - 1
        while start < stop:
            end = min(stop, self.bounds[chunk + 1])
            if start < end:  # a chunk may be empty
                index = self.chunk_offsets[chunk] + start - self.bounds[chunk]
                yield self.chunk_owners[chunk], index, start, end - start
            start, chunk = end, chunk + 1

    def owners(self, start: int, stop: int) -> tuple[int, ...]:
        """Ranks that hold the positions `[start, stop)`, one entry for each chunk."""
        return tuple(rank for rank, *_ in self.pieces(start, stop))

    def positions(self, rank: int) -> torch.Tensor:
        """Positions that `rank` holds, in local order: `[local_length]`."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.intervals(rank)])

    def merged(self, ranks: int) -> Layout:
        """Join every `ranks` neighbouring ranks into one rank, which holds all their chunks."""
        return Layout(self.length, self.size // ranks, tuple(owner // ranks for owner in self.chunk_owners))

    def restore(self) -> torch.Tensor:
        """Index of each position in the concatenation of all ranks' tokens: `[length]`."""
        return torch.cat([self.positions(rank) for rank in range(self.size)]).argsort()

    def locate(self, position: int) -> tuple[int, int]:
        """Rank that holds `position`, and its index on that rank."""
        if not 0 <= position < self.length:
            raise IndexError(
                f"position {position} is outside of a sequence of {self.length} tokens. Give a position that is "
                "at least 0 and less than the length."
            )
        ((rank, index, _, _),) = self.pieces(position, position + 1)
        return rank, index


def zigzag(length: int, size: int) -> Layout:
    """Cut the sequence into 2 * size chunks; rank r holds chunks r and 2 * size - 1 - r.

    Under a causal mask an early chunk has little work and a late chunk has much. An early and a late chunk together
    always have the same work. So all ranks have equal work, exactly so if 2 * size divides the length.

    Example: 16 tokens on 4 ranks, in 8 chunks of 2.

        position   0  1 |  2  3 |  4  5 |  6  7 |  8  9 | 10 11 | 12 13 | 14 15
        chunk        0  |    1  |    2  |    3  |    4  |    5  |    6  |    7
        rank         0  |    1  |    2  |    3  |    3  |    2  |    1  |    0

    Each rank computes 34 of the 136 pairs of a causal mask.
    """
    ranks = tuple(range(size))
    return Layout(length, size, ranks + ranks[::-1])


def contiguous(length: int, size: int) -> Layout:
    """Cut the sequence into `size` chunks; rank r holds chunk r.

    Neighbouring tokens stay neighbours, but under a causal mask the last rank has the most work.
    """
    return Layout(length, size, tuple(range(size)))


FIXED_LAYOUTS = {"zigzag": zigzag, "contiguous": contiguous}
"""Layouts that do not depend on documents."""
