"""Who must see whom, and what travels for it: built once a batch on the host, executed by every layer.

A rank meets the keys of the others in `size` steps. At step k it computes with the keys of rank r + k (its owner), so
that in a step every rank has a different owner. The keys come from rank r + 1 where that rank read the same keys in
the step before, and straight from their owner where it did not. So each rank receives what it reads, once, and nothing
else, whatever the mask; and where neighbours read the same keys, which for one long document is everywhere, they
travel as in a ring: from neighbour to neighbour.

Partial sums of key and value gradients follow the keys one step behind. Each reader adds its own and hands them to the
next reader that got those keys from it, the last one to the owner.

Tokens are numbered on their rank: row b's token i is b * local_length + i. Sets of tokens are intervals of those
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from .intervals import Interval, difference, intersection, total, union
from .layout import Layout
from .mask import Mask


class Piece(NamedTuple):
    """Tokens of one document that are neighbours on their rank and in the sequence."""

    start: int
    stop: int
    position: int

    @property
    def end(self) -> int:
        """The position after the last token's."""
        return self.position + self.stop - self.start

    def clip(self, first: int, last: int) -> Piece | None:
        """Its tokens at positions `[first, last)`, if there are any."""
        begin, end = max(first, self.position), min(last, self.end)
        if begin >= end:
            return None
        start = self.start + begin - self.position
        return Piece(start, start + end - begin, begin)


class Transfer(NamedTuple):
    """Tokens `[start, stop)` of a buffer, to or from rank `peer` of the group."""

    peer: int
    start: int
    stop: int


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
    def kept(self) -> dict:
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


@dataclass(frozen=True)
class Step:
    """What one rank does at one step. Ranges are of the step's key buffer, unless said otherwise.

    Args:
        tokens: length of the key buffer, which holds what this rank reads of the owner's keys. At step 0 the buffer
            is this rank's own keys, all of them.
        calls: the tiles to compute, as kernel calls.
        receives: where the keys come from.
        relays: keys to send on to rank r - 1, as ranges of the buffer of the step before.
        serves: keys to send to readers that have no neighbour to get them from, as ranges of this rank's own keys.
        joins: partial gradients to add to this rank's.
        hands_on: to whom the sum goes.
        homecomings: finished partial gradients from the rank that serves ended at, as ranges of this rank's own keys.
    """

    tokens: int
    calls: tuple[Segments, ...]
    receives: tuple[Transfer, ...] = ()
    relays: tuple[Transfer, ...] = ()
    serves: tuple[Transfer, ...] = ()
    joins: tuple[Transfer, ...] = ()
    hands_on: tuple[Transfer, ...] = ()
    homecomings: tuple[Transfer, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What one rank computes and moves for one batch and mask.

    Args:
        rank, size: this rank and the ranks of its group.
        tokens: how many tokens this rank holds, all rows counted.
        steps: the first is of this rank's own keys. In a ring there is one a rank.
    """

    rank: int
    size: int
    tokens: int
    steps: tuple[Step, ...]

    @property
    def pairs(self) -> int:
        """Query-key pairs that this rank computes."""
        return sum(call.pairs for step in self.steps for call in step.calls)

    @property
    def sent_keys(self) -> int:
        """Tokens whose keys and values this rank sends in a forward pass."""
        return self._others((*step.relays, *step.serves) for step in self.steps)

    @property
    def sent_gradients(self) -> int:
        """Tokens whose partial gradients this rank sends in a backward pass."""
        return self._others(step.hands_on for step in self.steps)

    def _others(self, of_steps: Iterable[tuple[Transfer, ...]]) -> int:
        """The tokens of transfers to other ranks."""
        return sum(t.stop - t.start for transfers in of_steps for t in transfers if t.peer != self.rank)


def build_plan(layout: Layout, mask: Mask, rank: int) -> Plan:
    """The plan of `rank` for a batch with this mask, dealt to the ranks by this layout."""
    reads = _Reads(layout, mask)
    steps = [_own_step(reads, rank)]
    steps += [_step(reads, rank, distance) for distance in range(1, layout.size)]
    return Plan(rank, layout.size, steps[0].tokens, tuple(steps))


def build_own_plan(layout: Layout, mask: Mask, rank: int) -> Plan:
    """The plan of `rank` for documents that lie on one rank each: nothing travels."""
    step = _own_step(_Reads(layout, mask), rank)
    return Plan(rank, layout.size, step.tokens, (step,))


def build_gathering_plan(layout: Layout, mask: Mask, rank: int) -> Plan:
    """A plan of `rank` in which all that it reads arrives at once, before anything is computed.

    The second step's buffer has the keys in the order of the sequence, document by document, those of this rank
    included, which it sends to itself. So queries that are neighbours in the sequence make one tile with all keys that
    they read, and there is nothing to merge. A causal or full mask takes two kernel calls at most: of zigzag's two
    chunks, so that no call has keys twice.
    """
    reads = _Reads(layout, mask)
    tokens = reads.tokens(rank)
    gathered = reads.gathered(rank)
    arrivals = tuple(Transfer(key.owner, key.at, key.at + key.stop - key.start) for key in gathered)
    departures = tuple(
        Transfer(reader, key.start, key.stop)
        for reader in range(layout.size)
        for key in (gathered if reader == rank else reads.gathered(reader))
        if key.owner == rank
    )
    computing = Step(
        tokens=arrivals[-1].stop if arrivals else 0,
        calls=reads.gathered_calls(rank, gathered),
        receives=arrivals,
        serves=departures,
        hands_on=arrivals,
        homecomings=departures,
    )
    return Plan(rank, layout.size, tokens, (Step(tokens, ()), computing))


def _own_step(reads: _Reads, rank: int) -> Step:
    """The step with this rank's own keys."""
    tokens = reads.tokens(rank)
    return Step(tokens, reads.calls(rank, rank, ((0, tokens),) if tokens else ()))


def _step(reads: _Reads, rank: int, distance: int) -> Step:
    """Step `distance` of `rank`."""
    size = reads.layout.size
    owner, reader = (rank + distance) % size, (rank - distance) % size
    before, after = (rank - 1) % size, (rank + 1) % size
    held = reads.needed(rank, owner)
    # The sender's lists and the receiver's are made from the same sets, in the same order, so they match.
    relayed, direct = reads.relayed(rank, owner), reads.direct(rank, owner)
    previous_owner = (rank + distance - 1) % size
    sent_on = reads.relayed(before, previous_owner)
    passed, home = reads.relayed(before, owner), reads.last(rank, owner)
    return Step(
        tokens=total(held),
        calls=reads.calls(rank, owner, held),
        receives=_transfers(after, relayed, held) + _transfers(owner, direct, held),
        relays=_transfers(before, sent_on, reads.needed(rank, previous_owner)),
        serves=tuple(Transfer(reader, *interval) for interval in reads.direct(reader, rank)),
        joins=_transfers(after, relayed, held),
        hands_on=_transfers(before, passed, held) + _transfers(owner, home, held),
        homecomings=tuple(Transfer(reader, *interval) for interval in reads.last(reader, rank)),
    )


class _Gathered(NamedTuple):
    """Keys `[start, stop)` of `owner`, at positions from `position` on, where they begin in the buffer."""

    owner: int
    start: int
    stop: int
    position: int
    document: int
    at: int


class _Reads:
    """Which of `owner`'s keys each `reader` reads, and from whom it gets them."""

    def __init__(self, layout: Layout, mask: Mask):
        self.layout = layout
        self.mask = mask
        documents = [document for row in mask.apart() for document in row]
        self.spans = [document[-1][1] - document[0][0] for document in documents]
        self.documents = pieces_of_documents(layout, mask)
        self.of_rank: list[set[int]] = [set() for _ in range(layout.size)]
        for number, pieces in enumerate(self.documents):
            for rank in pieces:
                self.of_rank[rank].add(number)
        self.needed = lru_cache(maxsize=None)(self._needed)

    def tokens(self, rank: int) -> int:
        """How many tokens a rank holds, all rows counted."""
        return len(self.mask.rows) * self.layout.local_length(rank)

    def _shared(self, reader: int, owner: int):
        """For each document that both hold: its number, the reader's pieces, and the owner's."""
        for number in sorted(self.of_rank[reader] & self.of_rank[owner]):
            yield number, self.documents[number][reader], self.documents[number][owner]

    def _visible(self, number: int, query: Piece, keys: list[Piece]) -> list[Piece]:
        """What `query` reads of the pieces of document `number` that another rank holds, as pieces.

        Ranks hold different chunks, so without a window it is all of a piece or none.
        """
        nearest, furthest = self.distances(number)
        if furthest is None:
            return [key for key in keys if key.position < query.position] if nearest == 0 else keys
        first, last = query.position - furthest, query.end - nearest
        clipped = (key.clip(first, last) for key in keys)
        return [key for key in clipped if key is not None]

    def distances(self, number: int) -> tuple[int | None, int | None]:
        """The least and the greatest distance from a query back to a key that it reads, in document `number`.

        None is no limit: a window as long as the document is none.
        """
        window, causal = self.mask.pattern.sliding_window, self.mask.pattern.causal
        if window is None or window >= self.spans[number]:
            return (0 if causal else None), None
        return (0 if causal else 1 - window), window - 1

    def _needed(self, reader: int, owner: int) -> list[Interval]:
        """The keys of `owner` that `reader` reads."""
        reads = []
        for number, queries, keys in self._shared(reader, owner):
            if self.distances(number)[1] is None:
                queries = queries[-1:]  # the last piece of a document reads what any earlier one reads
            for query in queries:
                reads += [(key.start, key.stop) for key in self._visible(number, query, keys)]
        return union(reads)

    def relayed(self, reader: int, owner: int) -> list[Interval]:
        """Those that `reader` gets from the rank after it, which read them one step earlier."""
        after = (reader + 1) % self.layout.size
        return (
            intersection(self.needed(reader, owner), self.needed(after, owner)) if owner not in (reader, after) else []
        )

    def direct(self, reader: int, owner: int) -> list[Interval]:
        """Those that `reader` gets from their owner."""
        return difference(self.needed(reader, owner), self.relayed(reader, owner))

    def last(self, reader: int, owner: int) -> list[Interval]:
        """Those that `reader` hands to nobody, so that their gradients go home from it."""
        return difference(self.needed(reader, owner), self.relayed((reader - 1) % self.layout.size, owner))

    def calls(self, reader: int, owner: int, buffer: list[Interval] | tuple[Interval, ...]) -> tuple[Segments, ...]:
        """The tiles of `reader`'s queries and `owner`'s keys, keys as ranges of `buffer`, grouped into calls."""
        tiles = [tile for shared in self._shared(reader, owner) for tile in self._tiles(*shared, reader == owner)]
        return _calls([(query, _within(key, buffer), band) for query, key, band in tiles])

    def gathered(self, reader: int) -> list[_Gathered]:
        """All keys that `reader` reads, its own included, document by document in the order of the sequence."""
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
        """The positions of document `number` that these queries read."""
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
        """The tiles of `reader`'s queries and all keys they read, grouped into calls."""
        runs: dict[int, list[Piece]] = {}
        for key in gathered:
            run = Piece(key.at, key.at + key.stop - key.start, key.position)
            _extend(runs.setdefault(key.document, []), run)
        first, later = [], []
        for number, keys in runs.items():
            nearest, furthest = self.distances(number)
            for index, query in enumerate(self.documents[number][reader]):
                tiles = later if index else first
                if furthest is not None:
                    tiles += _windowed_tiles([query], keys, nearest, furthest)
                    continue
                stop = max(key.stop for key in keys if nearest is None or key.position < query.end)
                if nearest is not None:  # the last keys that it reads are its own
                    stop = min(stop, next(k.start + query.end - k.position for k in keys if query.end <= k.end))
                band = FULL if nearest is None else CAUSAL
                tiles.append(((query.start, query.stop), (keys[0].start, stop), band))
        return tuple(_loosened(call) for tiles in (first, later) for call in _calls(tiles))

    def _tiles(self, number: int, queries: list[Piece], keys: list[Piece], own: bool):
        """Tiles of document `number` as (query range, key range, band), as few and large as can be."""
        nearest, furthest = self.distances(number)
        if furthest is not None:
            for query, key, band in _windowed_tiles(queries, keys, nearest, furthest):
                yield query, key, band.within(query[1] - query[0], key[1] - key[0])
        elif own and nearest == 0:
            # A rank holds its tokens in order, so a run of them is causal among itself whatever is missing between.
            runs = _runs(queries)
            for index, run in enumerate(runs):
                yield run, run, CAUSAL
                for earlier in runs[:index]:
                    yield run, earlier, FULL
        else:
            groups: dict[int, list[Piece]] = {}
            for query in queries:
                groups.setdefault(len(self._visible(number, query, keys)), []).append(query)
            for count, group in groups.items():
                for query in _runs(group):
                    for key in _runs(keys[:count]):
                        yield query, key, FULL


def _windowed_tiles(queries: list[Piece], keys: list[Piece], nearest: int, furthest: int):
    """Tiles in which a query reads the keys `nearest` to `furthest` positions before it.

    Both ranges are cut to what is read, so that every query reads a key and every key is read.
    """
    for whole_query in queries:
        for whole_key in keys:
            key = whole_key.clip(whole_query.position - furthest, whole_query.end - nearest)
            if key is None:
                continue
            query = whole_query.clip(key.position + nearest, key.end + furthest)
            beyond = query.end - key.end
            yield (query.start, query.stop), (key.start, key.stop), Band(furthest - beyond, beyond - nearest)


def _calls(tiles: list[tuple[Interval, Interval, Band]]) -> tuple[Segments, ...]:
    """Tiles of query range, key range and band as kernel calls, as few as can be."""
    calls: dict[Band, list[list[tuple[Interval, Interval]]]] = {}
    for query, key, band in sorted(tiles, key=lambda tile: tile[:2]):
        # The queries of a call must not overlap: a tile goes into the first call that ends before it begins.
        alike = calls.setdefault(band, [])
        call = next((call for call in alike if call[-1][0][1] <= query[0]), None)
        if call is None:
            alike.append(call := [])
        call.append((query, key))
    return tuple(
        Segments(*(tuple(column) for column in zip(*pairs)), band)
        for band, alike in sorted(calls.items(), key=lambda call: _order(call[0]))
        for pairs in alike
    )


def _loosened(call: Segments) -> Segments:
    """The call without the limits that bind none of its queries."""
    bands = {call.band.within(query[1] - query[0], key[1] - key[0]) for query, key in zip(call.queries, call.keys)}
    left = call.band.left if any(band.left is not None for band in bands) else None
    right = call.band.right if any(band.right is not None for band in bands) else None
    return Segments(call.queries, call.keys, Band(left, right))


def _order(band: Band) -> tuple:
    """Calls in a fixed order, those with the diagonal first."""
    return band.right is None, band.right or 0, band.left is not None, band.left or 0


def pieces_of_documents(layout: Layout, mask: Mask) -> list[dict[int, list[Piece]]]:
    """For each document of the batch: the pieces that each rank holds, by position."""
    local_lengths = [layout.local_length(rank) for rank in range(layout.size)]
    documents = []
    for row, row_documents in enumerate(mask.apart()):
        for document in row_documents:
            pieces: dict[int, list[Piece]] = {}
            for start, stop in document:
                for rank, index, position, length in layout.pieces(start, stop):
                    first = row * local_lengths[rank] + index
                    _extend(pieces.setdefault(rank, []), Piece(first, first + length, position))
            documents.append(pieces)
    return documents


def _extend(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece, to the last one where it goes on in both numberings."""
    if pieces and (pieces[-1].stop, pieces[-1].end) == (piece.start, piece.position):
        piece = Piece(pieces[-1].start, piece.stop, pieces.pop().position)
    pieces.append(piece)


def _runs(pieces: list[Piece]) -> tuple[Interval, ...]:
    """The pieces as ranges of their rank's tokens, with neighbours joined."""
    return joined(tuple((piece.start, piece.stop) for piece in pieces))


def joined(intervals: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """The intervals in their order, with each that begins where the last one ends joined to it."""
    runs: list[Interval] = []
    for start, stop in intervals:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)


def _within(interval: Interval, buffer: list[Interval] | tuple[Interval, ...]) -> Interval:
    """An interval of a rank's tokens as one of a buffer that holds the intervals `buffer` one after another."""
    offset = 0
    for start, stop in buffer:
        if start <= interval[0] and interval[1] <= stop:
            return offset + interval[0] - start, offset + interval[1] - start
        offset += stop - start
    raise AssertionError(f"{interval} is not in {buffer}")


def _transfers(peer: int, intervals: list[Interval], buffer: list[Interval]) -> tuple[Transfer, ...]:
    """Transfers of `intervals` of a rank's tokens, as ranges of `buffer`."""
    return tuple(Transfer(peer, *_within(interval, buffer)) for interval in intervals)


def take(tensor: torch.Tensor, runs: tuple[Interval, ...]) -> torch.Tensor:
    """The rows of `tensor` in `runs`, one after another: a view where there is one run."""
    if len(runs) == 1:
        return tensor[runs[0][0] : runs[0][1]]
    return torch.cat([tensor[start:stop] for start, stop in runs])
