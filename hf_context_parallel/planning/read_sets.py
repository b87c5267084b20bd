"""Read sets: the keys that each rank reads of each owner, the ranks that send them, and the tiles that use them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, TypeAlias

from .blocks import blocks_of
from .intervals import Interval, difference, intersection, near, union
from .layout import Layout
from .mask import Mask
from .pieces import Piece, band_between, extend, pieces_of_documents, runs_of
from .tiles import CAUSAL, FULL, Band, Segments

Tile: TypeAlias = tuple[Interval, Interval, Band]
"""A query range, the key range that it reads, and the band."""


class Held(NamedTuple):
    """Keys `[start, stop)` of `owner` in a buffer. The first is at `position` in the sequence, in row `at`."""

    owner: int
    start: int
    stop: int
    position: int
    document: int
    at: int


class Buffer:
    """Key buffer of a step: keys of other ranks, one after another.

    Args:
        keys: owner, document and piece of the keys, in order.
    """

    def __init__(self, keys: Iterable[tuple[int, int, Piece]]):
        self.held: list[Held] = []
        self.tokens = 0
        for owner, document, piece in keys:
            self.held.append(Held(owner, *piece, document, self.tokens))
            self.tokens += piece.stop - piece.start
        self._of_owner: dict[int, list[Held]] = {}
        for held in sorted(self.held):
            self._of_owner.setdefault(held.owner, []).append(held)

    def rows(self, owner: int, start: int, stop: int) -> Interval:
        """Rows of the keys `[start, stop)` of `owner`, which lie side by side in the buffer."""
        held = self._of_owner[owner]
        found = held[bisect_right(held, start, key=lambda keys: keys.start) - 1]
        assert found.start <= start and stop <= found.stop, f"{start, stop} is not in {found}"
        return found.at + start - found.start, found.at + stop - found.start

    def pieces(self) -> dict[int, list[Piece]]:
        """Keys of each document, as pieces of the buffer in its order."""
        pieces: dict[int, list[Piece]] = {}
        for keys in self.held:
            run = Piece(keys.at, keys.at + keys.stop - keys.start, keys.position)
            extend(pieces.setdefault(keys.document, []), run)
        return pieces


Pair: TypeAlias = tuple[Interval, Interval]
"""The same keys as rows of two buffers, or of a buffer and of the rank that owns them."""


class ReadSets:
    """Keys of each `owner` that each `reader` reads, and the ranks that send them.

    Args:
        layout: the rank of each token.
        mask: the documents, whose tokens read each other by its pattern.
        readers: tokens that read the documents in place of their own tokens: a mask with as many documents.
        together: number of owners whose keys a reader reads at each step.
    """

    def __init__(self, layout: Layout, mask: Mask, readers: Mask | None = None, together: int = 1):
        self.layout = layout
        self.mask = mask
        self.together = together
        both = zip(_edges(mask), _edges(mask if readers is None else readers))
        self.spans = [max(a[1], b[1]) - min(a[0], b[0]) for a, b in both]
        self.blocks = blocks_of(mask, self.spans)
        self.documents = pieces_of_documents(layout, mask)
        self.of_rank = _by_rank(self.documents, layout.size)
        self.are_apart = readers is not None
        self.queries = self.documents if readers is None else pieces_of_documents(layout, readers)
        self.read_by = _by_rank(self.queries, layout.size)
        self.reads = lru_cache(maxsize=None)(self._reads)
        self.needed = lru_cache(maxsize=None)(self._needed)
        self.buffer = lru_cache(maxsize=None)(self._buffer)

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

        None means no limit. A window that is as long as the document is no limit. What blocks add is left out. In a
        document with blocks there is always a limit, since a query may read a part of a piece.
        """
        window, causal = self.mask.pattern.sliding_window, self.mask.pattern.causal
        if window is None or window >= self.spans[number]:
            return (0 if causal else None), (self.spans[number] if self.blocks[number] else None)
        return (0 if causal else 1 - window), window - 1

    def _reads(self, reader: int, owner: int) -> dict[int, list[Piece]]:
        """Keys of `owner` that `reader` reads, as pieces of each document."""
        found = {}
        for number, queries, keys in self._shared(reader, owner):
            if self.distances(number)[1] is None:
                # The last piece of a document reads all keys that earlier ones read.
                read = self._visible(number, queries[-1], keys)
            else:
                read = [piece for key in keys for piece in self._windowed(number, queries, key)]
            if read:
                found[number] = read
        return found

    def _windowed(self, number: int, queries: list[Piece], key: Piece) -> Iterator[Piece]:
        """Yield the parts of a piece of keys that queries read under a window, and in their blocks."""
        visible = [part for query in queries for part in self._visible(number, query, [key])]
        read = [(part.position, part.end) for part in visible]
        read += (added.positions for added in self.blocks[number].added(queries, [key]))
        for first, last in union(read):
            part = key.clip(first, last)
            assert part is not None  # since it is read
            yield part

    def _needed(self, reader: int, owner: int) -> list[Interval]:
        """Keys of `owner` that `reader` reads, as intervals of the owner's tokens."""
        return union((piece.start, piece.stop) for read in self.reads(reader, owner).values() for piece in read)

    def steps(self) -> range:
        """Numbers of the steps that compute with keys of other ranks."""
        return range(1, 1 + -(-(self.layout.size - 1) // self.together))

    def distances_of(self, number: int) -> range:
        """Distances from a reader to the owners whose keys it reads at a step."""
        first = 1 + (number - 1) * self.together
        return range(first, min(first + self.together, self.layout.size))

    def _buffer(self, reader: int, number: int) -> Buffer:
        """Key buffer of a reader at a step.

        Its keys are ordered by documents. Under a window they are in the order of the sequence, so that neighbours
        make one tile. Otherwise keys that more queries read come first, so that each query reads a run of keys; among
        those, keys of one owner lie side by side, so that they arrive in one run.
        """
        keys = []
        for distance in self.distances_of(number):
            owner = (reader + distance) % self.layout.size
            for document, pieces in self.reads(reader, owner).items():
                queries, windowed = self.queries[document][reader], self.distances(document)[1] is not None
                for piece in pieces:
                    unread = 0 if windowed else sum(not self._visible(document, query, [piece]) for query in queries)
                    order = document, unread, 0 if windowed else distance, piece.position
                    keys.append((order, owner, piece))
        keys.sort(key=lambda key: key[0])
        return Buffer((owner, order[0], piece) for order, owner, piece in keys)

    def _forwarded(self, reader: int, distance: int) -> list[Interval]:
        """Keys of the owner at `distance` that `reader` gets from a rank that read them one step earlier."""
        if not self.together < distance < self.layout.size:
            return []
        owner, after = ((reader + apart) % self.layout.size for apart in (distance, self.together))
        return intersection(self.needed(reader, owner), self.needed(after, owner))

    def forwards(self, reader: int, number: int) -> list[Pair]:
        """Keys that are forwarded to `reader` at a step, by rank `reader + together`.

        Returns:
            Rows of that rank's buffer of the step before, and rows of the reader's buffer.
        """
        if number not in self.steps():
            return []
        before = self.buffer((reader + self.together) % self.layout.size, number - 1) if number > 1 else None
        forwarded = {}
        for distance in self.distances_of(number):
            forwarded[(reader + distance) % self.layout.size] = self._forwarded(reader, distance)
        pairs = []
        for keys in self.buffer(reader, number).held:
            for start, stop in intersection([(keys.start, keys.stop)], near(keys[1:3], forwarded[keys.owner])):
                assert before is not None  # nothing is forwarded at the first step
                at = keys.at + start - keys.start
                pairs.append((before.rows(keys.owner, start, stop), (at, at + stop - start)))
        return pairs

    def direct(self, reader: int, number: int, distance: int) -> list[Pair]:
        """Keys that `reader` gets from the owner at `distance`: rows of the owner, and rows of the reader's buffer."""
        owner = (reader + distance) % self.layout.size
        return self._of_owner(reader, number, owner, self._forwarded(reader, distance))

    def last(self, reader: int, number: int, distance: int) -> list[Pair]:
        """Keys of the owner at `distance` that `reader` does not forward, so that it returns their gradients.

        Returns:
            Rows of the owner, and rows of the reader's buffer.
        """
        owner, before = ((reader + apart) % self.layout.size for apart in (distance, -self.together))
        return self._of_owner(reader, number, owner, self._forwarded(before, distance + self.together))

    def _of_owner(self, reader: int, number: int, owner: int, without: list[Interval]) -> list[Pair]:
        """Rows of an owner that a reader holds at a step, and rows of its buffer, without some of the owner's rows."""
        pairs = []
        for keys in self.buffer(reader, number).held:
            if keys.owner == owner:
                for start, stop in difference([(keys.start, keys.stop)], near(keys[1:3], without)):
                    pairs.append(((start, stop), (keys.at + start - keys.start, keys.at + stop - keys.start)))
        return pairs

    def own_calls(self, rank: int) -> tuple[Segments, ...]:
        """Tiles of the queries of a rank and its own keys, grouped into calls. Keys index the tokens of the rank."""
        tiles = (self._tiles(number, queries, keys, own=True) for number, queries, keys in self._shared(rank, rank))
        return _calls(list(chain.from_iterable(tiles)))

    def calls(self, reader: int, number: int) -> tuple[Segments, ...]:
        """Tiles of the queries of a reader and the keys of a step, grouped into calls. Keys index the buffer."""
        keys = self.buffer(reader, number).pieces()
        queries = {document: self.queries[document][reader] for document in keys}
        return _calls([tile for d in keys for tile in self._tiles(d, queries[d], keys[d], own=False)])

    def gathered(self, reader: int) -> Buffer:
        """All keys that a reader reads, its own included, by document and then in the order of the sequence."""
        found = []
        for number in sorted(self.of_rank[reader]):
            owners = self.documents[number]
            read = self._positions_read(number, owners[reader])
            pieces = sorted((piece.position, owner, piece) for owner, pieces in owners.items() for piece in pieces)
            for first, last in read:
                for _, owner, whole in pieces:
                    piece = whole.clip(first, last)
                    if piece is not None:
                        found.append((owner, number, piece))
        return Buffer(found)

    def _positions_read(self, number: int, queries: list[Piece]) -> list[Interval]:
        """Positions of document `number` that these queries read."""
        nearest, furthest = self.distances(number)
        pieces = [piece for pieces in self.documents[number].values() for piece in pieces]
        begin, end = min(piece.position for piece in pieces), max(piece.end for piece in pieces)
        read = [
            (
                begin if furthest is None else max(begin, query.position - furthest),
                end if nearest is None else min(end, query.end - nearest),
            )
            for query in queries
        ]
        read += (added.positions for added in self.blocks[number].added(queries, pieces))
        return union(read)

    def gathered_calls(self, reader: int, gathered: Buffer) -> tuple[Segments, ...]:
        """Tiles of the queries of `reader` and all keys that they read, grouped into calls."""
        first: list[Tile] = []
        later: list[Tile] = []
        for number, keys in gathered.pieces().items():
            nearest, furthest = self.distances(number)
            for index, query in enumerate(self.documents[number][reader]):
                tiles = later if index else first
                if furthest is not None:
                    assert nearest is not None  # a window has both ends
                    tiles += _windowed_tiles([query], keys, nearest, furthest)
                    tiles += self._block_tiles(number, [query], keys)
                    continue
                stop = max(key.stop for key in keys if nearest is None or key.position < query.end)
                if nearest is not None:  # the last keys that a causal query reads are its own
                    stop = min(stop, next(k.start + query.end - k.position for k in keys if query.end <= k.end))
                band = FULL if nearest is None else CAUSAL
                tiles.append(((query.start, query.stop), (keys[0].start, stop), band))
        return tuple(call for tiles in (first, later) for call in _calls(_loosened(_calls(tiles))))

    def _tiles(self, number: int, queries: list[Piece], keys: list[Piece], own: bool) -> Iterator[Tile]:
        """Yield the tiles of document `number`, as few and as large as possible."""
        nearest, furthest = self.distances(number)
        if furthest is not None:
            assert nearest is not None  # a window has both ends
            tiles = _windowed_tiles(queries, keys, nearest, furthest)
            for query, key, band in chain(tiles, self._block_tiles(number, queries, keys)):
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

    def _block_tiles(self, number: int, queries: list[Piece], keys: list[Piece]) -> Iterator[Tile]:
        """Yield tiles of the keys that blocks of document `number` add."""
        for query, key, nearest, furthest in self.blocks[number].added(queries, keys):
            yield from _windowed_tiles([query], [key], nearest, furthest)


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
            yield (query.start, query.stop), (key.start, key.stop), band_between(query, key, nearest, furthest)


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


def _loosened(calls: tuple[Segments, ...]) -> list[Tile]:
    """Tiles of calls, without the limits that hide no key from any query of a call."""
    tiles = []
    for call in calls:
        bands = {call.band.within(query[1] - query[0], key[1] - key[0]) for query, key in zip(call.queries, call.keys)}
        left = call.band.left if any(band.left is not None for band in bands) else None
        right = call.band.right if any(band.right is not None for band in bands) else None
        tiles += [(query, key, Band(left, right)) for query, key in zip(call.queries, call.keys)]
    return tiles


def _order(band: Band) -> tuple[bool, int, bool, int]:
    """Sort key of calls: those with a limit to the right come first."""
    return band.right is None, band.right or 0, band.left is not None, band.left or 0
