"""All-to-all between all heads of a rank's tokens and all tokens of a rank's heads, and the dealing of heads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import torch

from .buffers import new_buffer
from .messages import Exchange, Message, in_flight, new_landing, new_message, shares_memory
from .rows import Rows

Dealt = Sequence[range]
"""Heads of each rank."""


def deal_heads(heads: int, size: int, turn: int = 0) -> list[range]:
    """Deal heads to ranks. Numbers of heads differ by one at most. With fewer heads than ranks, some ranks have none.

    Args:
        turn: number of ranks by which the shares are rotated. It differs between modules, so that no rank always has
            the larger share.
    """
    edges = [slot * heads // size for slot in range(size + 1)]
    return [range(edges[slot], edges[slot + 1]) for slot in ((rank - turn) % size for rank in range(size))]


def grouped_heads(shares: Sequence[range], ratio: int) -> list[range]:
    """Key heads of each rank, given its share of the query heads and the `ratio` of query heads to key heads."""
    return [range(s.start // ratio, (s.stop - 1) // ratio + 1) if s else range(0) for s in shares]


@lru_cache(maxsize=1024)
def reads_of(share: range, ratio: int, device: torch.device) -> torch.Tensor | None:
    """Find the key head of each query head of a rank: its index among the rank's `grouped_heads`, `[query heads]`.

    It is None if equally many query heads read each key head, since kernels need no index then. The index is
    cached on the device. It is no inference tensor, so autograd may save it.
    """
    reads = [head // ratio - share.start // ratio for head in share]
    equally = len(reads) // (reads[-1] + 1) if reads else 1
    if reads == [head // max(1, equally) for head in range(len(reads))]:
        return None
    with torch.inference_mode(False):
        return torch.tensor(reads, device=device)


@dataclass(frozen=True)
class TokenExchange:
    """Exchange of tokens and heads among the ranks of a group.

    Args:
        exchange: the messages of the group. None if messages are only counted.
        rank: this rank of the group.
        rows: number of rows of this rank's tensors.
        tokens: the rows that travel. None for all.
        counts: number of tokens that travel from each rank.
        places: rows of each rank's tokens among all tokens.
        whole: number of rows of all tokens. Rows that belong to no rank are 0.
    """

    exchange: Exchange | None
    rank: int
    rows: int
    tokens: Rows | None
    counts: Sequence[int]
    places: Sequence[Rows]
    whole: int

    def to_heads(self, tensors: Sequence[torch.Tensor], dealt: Sequence[Dealt]) -> list[torch.Tensor]:
        """Turn each `[rows, H, D]` into `[whole, h, D]`: all tokens of the heads of this rank.

        Args:
            dealt: the heads that each rank gets, for each tensor.
        """
        travelling = [x if self.tokens is None else self.tokens.of(x) for x in tensors]
        groups = _groups(_hashable(dealt), self.rank)
        sent = _ByHeads(partial(_sent, self._exchange), travelling, self.counts[self.rank], groups)
        for index, group, block in sent.blocks():
            block.copy_(_of_ranks(travelling[index], group.shares[index], group.ranks))
        own = [shares[self.rank] for shares in dealt]
        received = _ByTokens(partial(_received, self._exchange), tensors, self._other_counts, list(map(len, own)))
        with in_flight(self._exchange) as exchange:
            pending = exchange.post(sent.messages, received.messages)
            make = torch.Tensor.new_empty if sum(self.counts) == self.whole else torch.Tensor.new_zeros
            results = [make(x, (self.whole, len(share), x.shape[2])) for x, share in zip(tensors, own)]
            for result, x, share in zip(results, travelling, own):
                Rows.move(_heads(x, share), None, result, self.places[self.rank])
            del travelling, x  # which may be copies
            pending.wait()
        for result, block in zip(results, received.blocks()):
            Rows.move(block, None, result, self._elsewhere)
        return results

    def to_tokens(
        self, tensors: Sequence[torch.Tensor], dealt: Sequence[Dealt], totals: Sequence[int]
    ) -> list[torch.Tensor]:
        """Turn each `[whole, h, D]` into `[rows, H, D]`: the transpose of `to_heads`.

        A head that went to several ranks is summed over them. Tokens that do not travel are 0.

        Args:
            dealt: the heads that each rank has, for each tensor.
            totals: H of each tensor.
        """
        sends = self._sent_tokens(tensors)
        groups = _groups(_hashable(dealt), self.rank)
        received = _ByHeads(partial(_received, self._exchange), tensors, self.counts[self.rank], groups)
        once = [sum(map(len, shares)) == total for shares, total in zip(dealt, totals)]
        with in_flight(self._exchange) as exchange:
            pending = exchange.post(sends, received.messages)
            results = [
                (x.new_empty if single and self.tokens is None else x.new_zeros)(self.rows, total, x.shape[2])
                for x, single, total in zip(tensors, once, totals)
            ]
            for x, result, single, shares in zip(tensors, results, once, dealt):
                place = _heads(result, shares[self.rank])
                Rows.move(x, self.places[self.rank], place, self.tokens, add=not single)
            pending.wait()
        for index, group, block in received.blocks():
            result, share = results[index], group.shares[index]
            if once[index] and self.tokens is None:
                _of_ranks(result, share, group.ranks).copy_(block)
                continue
            for number, part in enumerate(block):
                start = share.start + number * len(share)
                place = _heads(result, range(start, start + len(share)))
                Rows.move(part, None, place, self.tokens, add=not once[index])
        return results

    def _sent_tokens(self, tensors: Sequence[torch.Tensor]) -> list[Message]:
        """Make the messages with the tokens of the other ranks. They are copied once at most."""
        if len(tensors) == 1 and not shares_memory(self._exchange, tensors[0]):
            return _messages(self._other_counts, self._elsewhere.of(tensors[0]).flatten())
        heads = [x.shape[1] for x in tensors]
        sent = _ByTokens(partial(_sent, self._exchange), tensors, self._other_counts, heads)
        for x, block in zip(tensors, sent.blocks()):
            Rows.move(x, self._elsewhere, block, None)
        return sent.messages

    @property
    def _exchange(self) -> Exchange:
        assert self.exchange is not None  # nothing is posted where messages are only counted
        return self.exchange

    @cached_property
    def _other_counts(self) -> dict[int, int]:
        """Number of tokens that travel from each other rank."""
        return {rank: count for rank, count in enumerate(self.counts) if rank != self.rank}

    @cached_property
    def _elsewhere(self) -> Rows:
        """Rows of the tokens of all other ranks, one rank after another."""
        return Rows.joined([self.places[rank] for rank in self._other_counts])


def _heads(x: torch.Tensor, share: range) -> torch.Tensor:
    """View the heads `share` of `[tokens, H, D]`."""
    return x if len(share) == x.shape[1] else x[:, share.start : share.stop]


def _of_ranks(x: torch.Tensor, first: range, count: int) -> torch.Tensor:
    """View heads of `[tokens, H, D]` by ranks, `[count, tokens, heads, D]`.

    Args:
        first: the heads of the first rank. The others have as many each, and follow it.
    """
    row, head, element = x.stride()
    start = x.storage_offset() + first.start * head
    shape, stride = (count, x.shape[0], len(first), x.shape[2]), (len(first) * head, row, head, element)
    return x.as_strided(shape, stride, start)


class _Group(NamedTuple):
    """Neighbouring ranks with equally many heads each, whose heads follow each other.

    `shares` holds the heads of the first of these ranks, for each tensor.
    """

    first: int
    ranks: int
    shares: tuple[range, ...]


def _hashable(dealt: Sequence[Dealt]) -> tuple[tuple[range, ...], ...]:
    return tuple(map(tuple, dealt))


@lru_cache(maxsize=1024)
def _groups(dealt: tuple[tuple[range, ...], ...], without: int) -> list[_Group]:
    """Group the ranks, so that the messages of a group are filled by one copy of each tensor.

    Args:
        without: a rank that is left out.
    """
    groups: list[_Group] = []
    for rank, shares in enumerate(zip(*dealt)):
        if rank == without:
            continue
        if groups:
            first, count, before = groups[-1]
            next_to = [range(s.start + count * len(s), s.stop + count * len(s)) for s in before]
            if rank == first + count and list(shares) == next_to:
                groups[-1] = _Group(first, count + 1, before)
                continue
        groups.append(_Group(rank, 1, shares))
    return groups


Make = Callable[[torch.Tensor, int, int], torch.Tensor]
"""Function of a tensor, a number of elements, and the number of messages that have them. It returns flat memory like
the tensor."""


def _sent(exchange: Exchange, like: torch.Tensor, size: int, messages: int) -> torch.Tensor:
    return new_message(exchange, like, size)


def _received(exchange: Exchange, like: torch.Tensor, size: int, messages: int) -> torch.Tensor:
    return new_landing(exchange, like, size) if messages == 1 else new_buffer(like, size)


class _ByHeads:
    """Messages with the same tokens and different heads: one for each rank of the groups, with its heads.

    Args:
        like: tensors `[tokens, H, D]`, of which the messages have parts.
        tokens: number of their tokens.
    """

    def __init__(self, make: Make, like: Sequence[torch.Tensor], tokens: int, groups: Sequence[_Group]):
        self.messages: list[Message] = []
        self._places: list[tuple[int, _Group, torch.Tensor, _View]] = []
        peers = [group.first + number for group in groups for number in range(group.ranks)]
        for alike in _alike(like):
            widths = [sum(len(group.shares[index]) * like[index].shape[2] for index in alike) for group in groups]
            sizes = [tokens * width for group, width in zip(groups, widths) for _ in range(group.ranks)]
            memory, start = make(like[alike[0]], sum(sizes), len(sizes)), 0
            self.messages += _cut(peers, memory, sizes)
            for group, width in zip(groups, widths):
                offset = start
                for index in alike:
                    heads, dim = len(group.shares[index]), like[index].shape[2]
                    view = (group.ranks, tokens, heads, dim), (tokens * width, width, dim, 1), offset
                    self._places.append((index, group, memory, view))
                    offset += heads * dim
                start += group.ranks * tokens * width

    def blocks(self) -> list[tuple[int, _Group, torch.Tensor]]:
        """View the memory of the messages by ranks, `[ranks, tokens, heads, D]`, with the index of the tensor."""
        return [(index, group, memory.as_strided(*view)) for index, group, memory, view in self._places]


class _ByTokens:
    """Messages with the same heads and different tokens.

    Args:
        like: tensors, of which the messages have parts.
        counts: number of tokens in the message of each rank.
        heads: number of heads of each tensor.
    """

    def __init__(self, make: Make, like: Sequence[torch.Tensor], counts: dict[int, int], heads: Sequence[int]):
        self.messages: list[Message] = []
        self._places: dict[int, tuple[torch.Tensor, _View]] = {}
        for alike in _alike(like):
            sizes = [heads[index] * like[index].shape[2] for index in alike]
            width, total, offset = sum(sizes), sum(counts.values()), 0
            memory = make(like[alike[0]], total * width, len(counts))
            self.messages += _messages(counts, memory)
            for index, size in zip(alike, sizes):
                dim = like[index].shape[2]
                self._places[index] = memory, ((total, heads[index], dim), (width, dim, 1), offset)
                offset += size

    def blocks(self) -> list[torch.Tensor]:
        """View the memory of the messages, `[tokens, heads, D]` for each tensor, with the tokens of all messages."""
        return [memory.as_strided(*view) for memory, view in map(self._places.__getitem__, range(len(self._places)))]


_View = tuple[Sequence[int], Sequence[int], int]
"""Shape, strides and offset."""


def _messages(counts: dict[int, int], memory: torch.Tensor) -> list[Message]:
    """Cut flat memory into messages with that many tokens from or to each rank."""
    width = memory.numel() // max(1, sum(counts.values()))
    return _cut(counts, memory, [count * width for count in counts.values()])


def _cut(peers: Collection[int], memory: torch.Tensor, sizes: Sequence[int]) -> list[Message]:
    """Cut flat memory into a message for each rank. Empty ones are left out. A single one is the memory itself."""
    parts = (memory,) if len(sizes) == 1 else memory.split_with_sizes(sizes)
    return [(peer, part) for peer, part in zip(peers, parts) if part.numel()]


def _alike(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Indices of the tensors of each dtype. Tensors of one dtype share messages."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, x in enumerate(tensors):
        by_dtype.setdefault(x.dtype, []).append(index)
    return list(by_dtype.values())
