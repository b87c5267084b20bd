"""Blocks of tokens that read each other whatever the causal rule says, such as the tokens of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .intervals import Interval, near_indices
from .mask import Block, Mask, Pattern
from .pieces import Piece, band_between
from .tiles import pairs_in_band


class Added(NamedTuple):
    """Pairs that a block adds: a query reads the keys that lie `nearest` to `furthest` positions before it.

    Keys that come later have distances below 0. Keys before the window have at least its size.
    """

    query: Piece
    key: Piece
    nearest: int
    furthest: int

    @property
    def positions(self) -> Interval:
        """Positions of the keys that are read."""
        first, last = self.query.position - self.furthest, self.query.end - self.nearest
        return max(self.key.position, first), min(self.key.end, last)

    @property
    def readers(self) -> Interval:
        """Positions of the queries that read a key."""
        first, last = self.key.position + self.nearest, self.key.end + self.furthest
        return max(self.query.position, first), min(self.query.end, last)

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        query, key = self.query, self.key
        return pairs_in_band(query.end - query.position, key.end - key.position, band_between(*self))


class Blocks:
    """Blocks of one document.

    Args:
        blocks: the blocks.
        pattern: the pattern that they belong to.
        span: number of positions from the first token of the document to its last.
    """

    def __init__(self, blocks: Sequence[Block], pattern: Pattern, span: int):
        ranges = sorted((start, stop, number) for number, block in enumerate(blocks) for start, stop in block)
        self._blocks = blocks
        self._edges: list[Interval] = [(start, stop) for start, stop, _ in ranges]
        self._numbers = [number for _, _, number in ranges]
        window = pattern.sliding_window
        self._distances = [(-span, -1)]
        if window is not None and window < span and not pattern.blocks_in_window:
            self._distances.append((window, span))

    def __len__(self) -> int:
        return len(self._blocks)

    def parts(self, pieces: Sequence[Piece]) -> dict[int, list[Piece]]:
        """Parts of pieces that lie in each block, by its number."""
        found: dict[int, list[Piece]] = {}
        for piece in pieces if self._blocks else ():
            for index in range(*near_indices((piece.position, piece.end), self._edges)):
                part = piece.clip(*self._edges[index])
                if part is not None:
                    found.setdefault(self._numbers[index], []).append(part)
        return found

    def __getitem__(self, number: int) -> Block:
        return self._blocks[number]

    def added(self, queries: Sequence[Piece], keys: Sequence[Piece]) -> Iterator[Added]:
        """Yield the pairs that blocks add between pieces of queries and keys."""
        read = self.parts(keys)
        for number, parts in self.parts(queries).items():
            for query in parts:
                for key in read.get(number, ()):
                    yield from self.between(query, key)

    def between(self, query: Piece, key: Piece) -> Iterator[Added]:
        """Yield the pairs that a block adds between a part of its queries and a part of its keys."""
        for nearest, furthest in self._distances:
            added = Added(query, key, nearest, furthest)
            first, last = added.positions
            if first < last:
                yield added


def blocks_of(mask: Mask, spans: Sequence[int]) -> list[Blocks]:
    """Make the blocks of each document of a mask.

    Args:
        spans: number of positions that each document spans.
    """
    return [Blocks(blocks, mask.pattern, span) for blocks, span in zip(mask.blocks_of_documents(), spans)]
