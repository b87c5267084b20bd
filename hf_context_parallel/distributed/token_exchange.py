"""All-to-all between all heads of a rank's tokens and all tokens of a rank's heads, and the dealing of heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from .buffers import new_buffer
from .messages import Exchange, in_flight
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
        sent = {rank: _empty(tensors, self.counts[self.rank], [d[rank] for d in dealt]) for rank in self._others}
        for rank, message in sent.items():
            for block, x, shares in zip(message.blocks, tensors, dealt):
                Rows.move(_heads(x, shares[rank]), self.tokens, block, None)
        own = [shares[self.rank] for shares in dealt]
        received = {rank: _empty(tensors, self.counts[rank], own) for rank in self._others}
        with self._posted(sent, received):
            make = torch.Tensor.new_empty if sum(self.counts) == self.whole else torch.Tensor.new_zeros
            results = [make(x, (self.whole, len(share), x.shape[2])) for x, share in zip(tensors, own)]
            for result, x, share in zip(results, tensors, own):
                Rows.move(_heads(x, share), self.tokens, result, self.places[self.rank])
        for rank, message in received.items():
            for result, block in zip(results, message.blocks):
                Rows.move(block, None, result, self.places[rank])
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
        count = self.counts[self.rank]
        sent = {rank: _filled([self.places[rank].of(x) for x in tensors]) for rank in self._others}
        received = {rank: _empty(tensors, count, [d[rank] for d in dealt]) for rank in self._others}
        once = [sum(map(len, shares)) == total for shares, total in zip(dealt, totals)]
        with self._posted(sent, received):
            results = [
                (x.new_empty if single and self.tokens is None else x.new_zeros)(self.rows, total, x.shape[2])
                for x, single, total in zip(tensors, once, totals)
            ]
            for x, result, single, shares in zip(tensors, results, once, dealt):
                place = _heads(result, shares[self.rank])
                Rows.move(x, self.places[self.rank], place, self.tokens, add=not single)
        for rank, message in received.items():
            for block, result, single, shares in zip(message.blocks, results, once, dealt):
                Rows.move(block, None, _heads(result, shares[rank]), self.tokens, add=not single)
        return results

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(len(self.counts)) if rank != self.rank]

    @contextmanager
    def _posted(self, sent: dict[int, _Message], received: dict[int, _Message]) -> Iterator[None]:
        """Post a message to each other rank and one from each, and wait for them at the end of the block."""
        sends, receives = (
            [(rank, part) for rank, message in side.items() for part in message.parts if part.numel()]
            for side in (sent, received)
        )
        assert self.exchange is not None  # nothing is posted where messages are only counted
        with in_flight(self.exchange) as exchange:
            pending = exchange.post(sends, receives)
            yield
            pending.wait()


def _heads(x: torch.Tensor, share: range) -> torch.Tensor:
    """View the heads `share` of `[tokens, H, D]`."""
    return x[:, share.start : share.stop]


class _Message(NamedTuple):
    """Message with some tokens and heads of tensors.

    `parts` holds one buffer for each dtype. `blocks` holds a view `[tokens, heads, D]` of them for each tensor.
    """

    parts: Sequence[torch.Tensor]
    blocks: Sequence[torch.Tensor]


def _empty(like: Sequence[torch.Tensor], tokens: int, heads: Sequence[range]) -> _Message:
    """Allocate a message of `tokens` tokens, with the given heads of each tensor."""
    widths = [len(share) * x.shape[-1] for x, share in zip(like, heads)]
    parts, blocks = [], {}
    for dtype in dict.fromkeys(x.dtype for x in like):
        alike = [index for index, x in enumerate(like) if x.dtype == dtype]
        parts.append(new_buffer(like[alike[0]], tokens, sum(widths[index] for index in alike)))
        for index, block in zip(alike, parts[-1].split([widths[index] for index in alike], dim=1)):
            blocks[index] = block.unflatten(1, (len(heads[index]), like[index].shape[-1]))
    return _Message(parts, [blocks[index] for index in range(len(like))])


def _filled(tensors: Sequence[torch.Tensor]) -> _Message:
    """Make a message of tensors `[tokens, heads, D]`. A single tensor is not copied."""
    if len(tensors) == 1:
        return _Message([tensors[0].flatten(1)], tensors)
    message = _empty(tensors, len(tensors[0]), [range(x.shape[1]) for x in tensors])
    for block, x in zip(message.blocks, tensors):
        block.copy_(x)
    return message
