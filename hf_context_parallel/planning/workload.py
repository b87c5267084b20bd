"""Counts of the tokens and pairs that each rank of a group computes and reads, made without a plan.

A plan lists the tiles and messages of one rank. A workload counts the tokens and pairs of all ranks, for estimates of
their time. It visits the pieces of each document once, so it is cheap even for a thousand ranks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from operator import or_

from .blocks import Added, Blocks
from .intervals import Interval, total, union
from .layout import Layout
from .mask import Block, Mask, Pattern
from .pieces import Piece, pieces_of_documents
from .tiles import Band, pairs_in_band


@dataclass(frozen=True)
class Workload:
    """Counts, each with one entry for each rank.

    Args:
        tokens: tokens of the rank that are in a document.
        pairs: query-key pairs that the rank computes if queries stay on it. Padding inside a document counts as
            tokens.
        read: tokens of other ranks that the rank reads.
        owners: number of other ranks whose tokens the rank reads.
        merged: rows of its queries that are merged if the keys of each owner are computed apart.
        exchanged: tokens of documents that lie on several ranks.
        own_pairs: pairs of documents that lie on this rank alone.
        documents: number of documents that the rank has tokens of.
    """

    tokens: tuple[int, ...]
    pairs: tuple[int, ...]
    read: tuple[int, ...]
    owners: tuple[int, ...]
    merged: tuple[int, ...]
    exchanged: tuple[int, ...]
    own_pairs: tuple[int, ...]
    documents: tuple[int, ...]


def workload(layout: Layout, mask: Mask) -> Workload:
    """Count what the ranks of a layout compute and read."""
    size = layout.size
    tokens, pairs, read, merged, exchanged, own_pairs, documents = ([0] * size for _ in range(7))
    masks = [0] * size  # the owners that a rank reads, as bits
    for pieces, blocks in zip(pieces_of_documents(layout, mask), mask.blocks_of_documents()):
        document = _Document(pieces, mask.pattern, blocks)
        for rank, queries in pieces.items():
            count = sum(query.stop - query.start for query in queries)
            computed = sum(document.pairs(query) for query in queries)
            tokens[rank] += count
            pairs[rank] += computed
            documents[rank] += 1
            if len(pieces) == 1:
                own_pairs[rank] += computed
                continue
            exchanged[rank] += count
            others, met, rows = document.read(rank)
            read[rank] += others
            masks[rank] |= met
            merged[rank] += rows
    owners = [mask.bit_count() for mask in masks]
    found = tokens, pairs, read, owners, merged, exchanged, own_pairs, documents
    return Workload(*(tuple(counts) for counts in found))


class _Document:
    """Pieces of a document in the order of the sequence, with running sums."""

    def __init__(self, pieces: dict[int, list[Piece]], pattern: Pattern, blocks: list[Block]):
        ordered = sorted((piece.position, piece.end, rank) for rank, of_rank in pieces.items() for piece in of_rank)
        self._pieces = pieces
        self._starts = [start for start, _, _ in ordered]
        self._ends = [end for _, end, _ in ordered]
        self._ranks = [rank for _, _, rank in ordered]
        self._sums = [0, *accumulate(end - start for start, end, _ in ordered)]
        self._owners: list[int] = [0, *accumulate((1 << rank for rank in self._ranks), or_)]
        self._begin, self._end = self._starts[0], self._ends[-1]
        span, window = self._end - self._begin, pattern.sliding_window
        self._blocks = Blocks(blocks, pattern, span)
        limit = None if window is None or window >= span else window
        if blocks and limit is None:  # a query may read a part of a piece
            limit = span
        self._nearest = 0 if pattern.causal else None if limit is None else 1 - limit
        self._furthest = None if limit is None else limit - 1

    def pairs(self, query: Piece) -> int:
        """Pairs that a piece computes, as if the document had no padding inside."""
        keys, queries = self._end - self._begin, query.end - query.position
        beyond = self._end - query.end
        left = None if self._furthest is None else self._furthest + beyond
        right = None if self._nearest is None else -self._nearest - beyond
        within = sum(added.pairs for added, _ in self._added([query]))
        return pairs_in_band(queries, keys, Band(left, right)) + within

    def _added(self, queries: list[Piece]) -> Iterator[tuple[Added, int]]:
        """Yield the pairs that blocks add for some pieces, and the rank that owns their keys."""
        for number, parts in self._blocks.parts(queries).items():
            for first, last in self._blocks[number]:
                begin, end = bisect_right(self._ends, first), bisect_left(self._starts, last)
                for start, stop, owner in zip(self._starts[begin:end], self._ends[begin:end], self._ranks[begin:end]):
                    key = Piece(0, stop - start, start).clip(first, last)
                    assert key is not None  # since they meet
                    for query in parts:
                        yield from ((added, owner) for added in self._blocks.between(query, key))

    def _range(self, query: Piece) -> tuple[int, int]:
        """Positions that a piece reads."""
        first = self._begin if self._furthest is None else max(self._begin, query.position - self._furthest)
        last = self._end if self._nearest is None else min(self._end, query.end - self._nearest)
        return first, last

    def read(self, rank: int) -> tuple[int, int, int]:
        """Count what a rank reads of other ranks.

        Returns:
            The number of tokens, their owners as bits, and the number of rows that the rank merges.
        """
        ranges = []
        rows = owners = 0
        near: dict[int, list[Interval]] = {}
        for query in self._pieces[rank]:
            first, last = self._range(query)
            met = self._met(first, last) & ~(1 << rank)
            owners |= met
            if self._furthest is None:
                rows += met.bit_count() * (query.end - query.position)
            else:
                self._add_near(near, query, rank)
            ranges.append((first, last))
        for added, owner in self._added(self._pieces[rank]):
            ranges.append(added.positions)
            if owner != rank:
                owners |= 1 << owner
                near.setdefault(owner, []).append(added.readers)
        rows += sum(total(union(reads)) for reads in near.values())
        ranges = union(ranges)
        held = sum(
            max(0, min(piece.end, last) - max(piece.position, first))
            for piece in self._pieces[rank]
            for first, last in ranges
        )
        return sum(self._tokens(last) - self._tokens(first) for first, last in ranges) - held, owners, rows

    def _add_near(self, rows: dict[int, list[Interval]], query: Piece, rank: int) -> None:
        """Add the rows of a piece that read each other rank under a window, by that rank."""
        nearest, furthest = self._nearest, self._furthest
        assert nearest is not None and furthest is not None  # a window has both
        begin = bisect_right(self._ends, query.position - furthest)
        end = bisect_left(self._starts, query.end - nearest)
        for start, stop, owner in zip(self._starts[begin:end], self._ends[begin:end], self._ranks[begin:end]):
            if owner != rank:
                reads = max(query.position, start + nearest), min(query.end, stop + furthest)
                rows.setdefault(owner, []).append(reads)

    def _tokens(self, position: int) -> int:
        """Number of tokens of the document before a position."""
        index = bisect_left(self._starts, position)
        return self._sums[index] - (max(0, self._ends[index - 1] - position) if index else 0)

    def _met(self, first: int, last: int) -> int:
        """Owners of positions `[first, last)`, as bits."""
        begin, end = bisect_right(self._ends, first), bisect_left(self._starts, last)
        if begin == 0:
            return self._owners[end]
        met = 0
        for rank in self._ranks[begin:end]:
            met |= 1 << rank
        return met
