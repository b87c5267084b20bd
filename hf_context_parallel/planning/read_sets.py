"""Read sets: the keys that each rank reads of each owner, the ranks that send them, and the tiles that use them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from .intervals import Interval, difference, intersection, union
from .layout import Layout
from .mask import Mask
from .pieces import Piece, extend, pieces_of_documents, runs_of
from .tiles import CAUSAL, FULL, Band, Segments

Tile: TypeAlias = tuple[Interval, Interval, Band]
"""A query range, the key range that it reads, and the band."""


class _Gathered(NamedTuple):
    """Keys `[start, stop)` of `owner`. The first is at `position` in the sequence, and at `at` in the buffer."""

    owner: int
    start: int
    stop: int
    position: int
    document: int
    at: int


class ReadSets:
    """Keys of each `owner` that each `reader` reads, and the ranks that send them.

    Args:
        layout: the rank of each token.
        mask: the documents, whose tokens read each other by its pattern.
        readers: tokens that read the documents in place of their own tokens: a mask with as many documents.
    """

    def __init__(self, layout: Layout, mask: Mask, readers: Mask | None = None):
        self.layout = layout
        self.mask = mask
        both = zip(_edges(mask), _edges(mask if readers is None else readers))
        self.spans = [max(a[1], b[1]) - min(a[0], b[0]) for a, b in both]
        self.documents = pieces_of_documents(layout, mask)
        self.of_rank = _by_rank(self.documents, layout.size)
        self.are_apart = readers is not None
        self.queries = self.documents if readers is None else pieces_of_documents(layout, readers)
        self.read_by = _by_rank(self.queries, layout.size)
        self.needed = lru_cache(maxsize=None)(self._needed)

    def tokens(self, rank: int) -> int:
        """Number of tokens that a rank holds, all rows counted."""
        return len(self.mask.rows) * self.layout.local_length(rank)

    def _shared(self, reader: int, owner: int) -> Iterator[tuple[int, list[Piece], list[Piece]]]:
        """Yield, for each document that both ranks hold, its number, the reader's pieces and the owner's pieces."""
        for number in sorted(self.read_by[reader] & self.of_rank[owner]):
            yield number, self.queries[number][reader], self.documents[number][owner]

    def _visible(self, number: int, query: Piece, keys: list[Piece]) -> list[Piece]:
        """Parts that `query` reads of `keys`, which are the pieces of document `number` on another rank.

        Ranks hold different chunks. So without a window, `query` reads a piece entirely or not at all.
        """
        nearest, furthest = self.distances(number)
        if furthest is None:
            return [key for key in keys if key.position < query.position] if nearest == 0 else keys
        assert nearest is not None  # a window has both ends
        first, last = query.position - furthest, query.end - nearest
        clipped = (key.clip(first, last) for key in keys)
        return [key for key in clipped if key is not None]

    def distances(self, number: int) -> tuple[int | None, int | None]:
        """Least and greatest distance from a query back to a key that it reads, in document `number`.

        None means no limit. A window that is as long as the document is no limit.
        """
        window, causal = self.mask.pattern.sliding_window, self.mask.pattern.causal
        if window is None or window >= self.spans[number]:
            return (0 if causal else None), None
        return (0 if causal else 1 - window), window - 1

    def _needed(self, reader: int, owner: int) -> list[Interval]:
        """Keys of `owner` that `reader` reads."""
        reads = []
        for number, queries, keys in self._shared(reader, owner):
            if self.distances(number)[1] is None:
                queries = queries[-1:]  # the last piece of a document reads all keys that earlier ones read
            for query in queries:
                reads += [(key.start, key.stop) for key in self._visible(number, query, keys)]
        return union(reads)

    def forwarded(self, reader: int, owner: int) -> list[Interval]:
        """Keys that the rank after `reader` forwards to it, after reading them one step earlier."""
        after = (reader + 1) % self.layout.size
        return (
            intersection(self.needed(reader, owner), self.needed(after, owner)) if owner not in (reader, after) else []
        )

    def direct(self, reader: int, owner: int) -> list[Interval]:
        """Keys that `reader` gets from their owner."""
        return difference(self.needed(reader, owner), self.forwarded(reader, owner))

    def last(self, reader: int, owner: int) -> list[Interval]:
        """Keys that `reader` does not forward, so that it returns the sum of their gradients to the owner."""
        return difference(self.needed(reader, owner), self.forwarded((reader - 1) % self.layout.size, owner))

    def calls(self, reader: int, owner: int, buffer: list[Interval] | tuple[Interval, ...]) -> tuple[Segments, ...]:
        """Tiles of the queries of `reader` and the keys of `owner`, grouped into calls. Keys index `buffer`."""
        tiles = [
            tile
            for number, queries, keys in self._shared(reader, owner)
            for tile in self._tiles(number, queries, keys, reader == owner)
        ]
        return _calls([(query, within(key, buffer), band) for query, key, band in tiles])

    def gathered(self, reader: int) -> list[_Gathered]:
        """All keys that `reader` reads, its own included, by document and then in the order of the sequence."""
        gathered, at = [], 0
        for number in sorted(self.of_rank[reader]):
            owners = self.documents[number]
            read = self._positions_read(number, owners[reader])
            pieces = sorted((piece.position, owner, piece) for owner, pieces in owners.items() for piece in pieces)
            for first, last in read:
                for _, owner, whole in pieces:
                    piece = whole.clip(first, last)
                    if piece is not None:
                        gathered.append(_Gathered(owner, *piece, number, at))
                        at += piece.stop - piece.start
        return gathered

    def _positions_read(self, number: int, queries: list[Piece]) -> list[Interval]:
        """Positions of document `number` that these queries read."""
        nearest, furthest = self.distances(number)
        pieces = [piece for pieces in self.documents[number].values() for piece in pieces]
        begin, end = min(piece.position for piece in pieces), max(piece.end for piece in pieces)
        return union(
            (
                begin if furthest is None else max(begin, query.position - furthest),
                end if nearest is None else min(end, query.end - nearest),
            )
            for query in queries
        )

    def gathered_calls(self, reader: int, gathered: list[_Gathered]) -> tuple[Segments, ...]:
        """Tiles of the queries of `reader` and all keys that they read, grouped into calls."""
        runs: dict[int, list[Piece]] = {}
        for key in gathered:
            run = Piece(key.at, key.at + key.stop - key.start, key.position)
            extend(runs.setdefault(key.document, []), run)
        first: list[Tile] = []
        later: list[Tile] = []
        for number, keys in runs.items():
            nearest, furthest = self.distances(number)
            for index, query in enumerate(self.documents[number][reader]):
                tiles = later if index else first
                if furthest is not None:
                    assert nearest is not None  # a window has both ends
                    tiles += _windowed_tiles([query], keys, nearest, furthest)
                    continue
                stop = max(key.stop for key in keys if nearest is None or key.position < query.end)
                if nearest is not None:  # the last keys that a causal query reads are its own
                    stop = min(stop, next(k.start + query.end - k.position for k in keys if query.end <= k.end))
                band = FULL if nearest is None else CAUSAL
                tiles.append(((query.start, query.stop), (keys[0].start, stop), band))
        return tuple(_loosened(call) for tiles in (first, later) for call in _calls(tiles))

    def _tiles(self, number: int, queries: list[Piece], keys: list[Piece], own: bool) -> Iterator[Tile]:
        """Yield the tiles of document `number`, as few and as large as possible."""
        nearest, furthest = self.distances(number)
        if furthest is not None:
            assert nearest is not None  # a window has both ends
            for query, key, band in _windowed_tiles(queries, keys, nearest, furthest):
                yield query, key, band.within(query[1] - query[0], key[1] - key[0])
        elif own and nearest == 0 and not self.are_apart:
            # A rank holds its tokens in order. So a run of them is causal within itself, even with gaps.
            runs = runs_of(queries)
            for index, run in enumerate(runs):
                yield run, run, CAUSAL
                for earlier in runs[:index]:
                    yield run, earlier, FULL
        else:
            groups: dict[int, list[Piece]] = {}
            for piece in queries:
                groups.setdefault(len(self._visible(number, piece, keys)), []).append(piece)
            for count, group in groups.items():
                for query in runs_of(group):
                    for key in runs_of(keys[:count]):
                        yield query, key, FULL


def _edges(mask: Mask) -> list[Interval]:
    """List the first position of each document, and the one after its last."""
    return [(document[0][0], document[-1][1]) for row in mask.apart() for document in row]


def _by_rank(documents: list[dict[int, list[Piece]]], size: int) -> list[set[int]]:
    """List the numbers of the documents of which each rank holds tokens."""
    numbers: list[set[int]] = [set() for _ in range(size)]
    for number, pieces in enumerate(documents):
        for rank in pieces:
            numbers[rank].add(number)
    return numbers


def _windowed_tiles(queries: list[Piece], keys: list[Piece], nearest: int, furthest: int) -> Iterator[Tile]:
    """Yield tiles in which a query reads the keys that lie `nearest` to `furthest` positions before it.

    Both ranges are clipped, so that every query reads a key and every key is read.
    """
    for whole_query in queries:
        for whole_key in keys:
            key = whole_key.clip(whole_query.position - furthest, whole_query.end - nearest)
            if key is None:
                continue
            query = whole_query.clip(key.position + nearest, key.end + furthest)
            assert query is not None  # since the key is read
            beyond = query.end - key.end
            yield (query.start, query.stop), (key.start, key.stop), Band(furthest - beyond, beyond - nearest)


def _calls(tiles: list[Tile]) -> tuple[Segments, ...]:
    """Group tiles into as few kernel calls as possible."""
    calls: dict[Band, list[list[tuple[Interval, Interval]]]] = {}
    for query, key, band in sorted(tiles, key=lambda tile: tile[:2]):
        # The queries of a call must not overlap: a tile goes into the first call that ends before it begins.
        alike = calls.setdefault(band, [])
        call = next((call for call in alike if call[-1][0][1] <= query[0]), None)
        if call is None:
            alike.append(call := [])
        call.append((query, key))
    return tuple(
        Segments(tuple(query for query, _ in pairs), tuple(key for _, key in pairs), band)
        for band, alike in sorted(calls.items(), key=lambda call: _order(call[0]))
        for pairs in alike
    )


def _loosened(call: Segments) -> Segments:
    """Call without the limits that hide no key from any of its queries."""
    bands = {call.band.within(query[1] - query[0], key[1] - key[0]) for query, key in zip(call.queries, call.keys)}
    left = call.band.left if any(band.left is not None for band in bands) else None
    right = call.band.right if any(band.right is not None for band in bands) else None
    return Segments(call.queries, call.keys, Band(left, right))


def _order(band: Band) -> tuple[bool, int, bool, int]:
    """Sort key of calls: those with a limit to the right come first."""
    return band.right is None, band.right or 0, band.left is not None, band.left or 0


def within(interval: Interval, buffer: list[Interval] | tuple[Interval, ...]) -> Interval:
    """Translate an interval of a rank's tokens to a buffer that holds the intervals `buffer` one after another."""
    offset = 0
    for start, stop in buffer:
        if start <= interval[0] and interval[1] <= stop:
            return offset + interval[0] - start, offset + interval[1] - start
        offset += stop - start
    raise AssertionError(f"{interval} is not in {buffer}")
