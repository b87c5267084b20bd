"""An all-to-all of some heads of all tokens for all heads of some tokens, and the heads that each rank is dealt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from .messages import Exchange, Pending
from .rows import Rows

Dealt = Sequence[range]
"""For each rank the heads that it gets."""


def deal_heads(heads: int, size: int, turn: int = 0) -> list[range]:
    """For each rank its heads: equally many, or one more. With fewer heads than ranks some have none.

    Args:
        turn: how far the shares are moved on. Modules take turns, so that no rank always has more.
    """
    edges = [slot * heads // size for slot in range(size + 1)]
    return [range(edges[slot], edges[slot + 1]) for slot in ((rank - turn) % size for rank in range(size))]


def grouped_heads(shares: Sequence[range], ratio: int) -> list[range]:
    """For each rank, which heads of tensors that have one for every `ratio` of the dealt ones its own share."""
    return [range(s.start // ratio, (s.stop - 1) // ratio + 1) if s else range(0) for s in shares]


@lru_cache(maxsize=1024)
def reads_of(share: range, ratio: int, device: torch.device) -> torch.Tensor | None:
    """Which of a rank's `grouped_heads` each of its own reads; None where equally many read each, as kernels want.

    Made once: a layer finds it on the device. Autograd may save it, wherever it was made.
    """
    reads = [head // ratio - share.start // ratio for head in share]
    equally = len(reads) // (reads[-1] + 1) if reads else 1
    if reads == [head // max(1, equally) for head in range(len(reads))]:
        return None
    with torch.inference_mode(False):
        return torch.tensor(reads, device=device)


@dataclass(frozen=True)
class TokenExchange:
    """Which tokens the ranks of a group exchange.

    Args:
        exchange: the group's messages; None where they are only counted.
        rank: this rank in it.
        rows: how many rows this rank's tensors have.
        tokens: which of them travel; None for all.
        counts: for each rank, how many tokens travel from there.
        places: for each rank, the rows that its tokens have among all tokens.
        whole: how many rows all tokens have. Those that are nobody's place are 0.
    """

    exchange: Exchange | None
    rank: int
    rows: int
    tokens: Rows | None
    counts: Sequence[int]
    places: Sequence[Rows]
    whole: int

    def to_heads(self, tensors: Sequence[torch.Tensor], dealt: Sequence[Dealt]) -> list[torch.Tensor]:
        """Each `[rows, H, D]` as `[whole, h, D]`: all tokens of the heads that this rank is dealt.

        Args:
            dealt: for each tensor and each rank, the heads that go there.
        """
        sent = {rank: _empty(tensors, self.counts[self.rank], [d[rank] for d in dealt]) for rank in self._others}
        for rank, message in sent.items():
            for block, x, shares in zip(message.blocks, tensors, dealt):
                Rows.move(_heads(x, shares[rank]), self.tokens, block, None)
        own = [shares[self.rank] for shares in dealt]
        received = {rank: _empty(tensors, self.counts[rank], own) for rank in self._others}
        pending = self._post(sent, received)
        make = torch.Tensor.new_empty if sum(self.counts) == self.whole else torch.Tensor.new_zeros
        results = [make(x, (self.whole, len(share), x.shape[2])) for x, share in zip(tensors, own)]
        for result, x, share in zip(results, tensors, own):
            Rows.move(_heads(x, share), self.tokens, result, self.places[self.rank])
        pending.wait()
        for rank, message in received.items():
            for result, block in zip(results, message.blocks):
                Rows.move(block, None, result, self.places[rank])
        return results

    def to_tokens(
        self, tensors: Sequence[torch.Tensor], dealt: Sequence[Dealt], totals: Sequence[int]
    ) -> list[torch.Tensor]:
        """Each `[whole, h, D]` as `[rows, H, D]`, H of `totals`: the transpose of `to_heads`.

        What the ranks have of a head that went to several is added up, and tokens that do not travel are 0.
        """
        count = self.counts[self.rank]
        sent = {rank: _filled([self.places[rank].of(x) for x in tensors]) for rank in self._others}
        received = {rank: _empty(tensors, count, [d[rank] for d in dealt]) for rank in self._others}
        pending = self._post(sent, received)
        once = [sum(map(len, shares)) == total for shares, total in zip(dealt, totals)]
        results = [
            (x.new_empty if single and self.tokens is None else x.new_zeros)(self.rows, total, x.shape[2])
            for x, single, total in zip(tensors, once, totals)
        ]
        for x, result, single, shares in zip(tensors, results, once, dealt):
            place = _heads(result, shares[self.rank])
            Rows.move(x, self.places[self.rank], place, self.tokens, add=not single)
        pending.wait()
        for rank, message in received.items():
            for block, result, single, shares in zip(message.blocks, results, once, dealt):
                Rows.move(block, None, _heads(result, shares[rank]), self.tokens, add=not single)
        return results

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(len(self.counts)) if rank != self.rank]

    def _post(self, sent: dict[int, _Message], received: dict[int, _Message]) -> Pending:
        """A message to each rank, and one from each."""
        sends, receives = (
            [(rank, part) for rank, message in side.items() for part in message.parts if part.numel()]
            for side in (sent, received)
        )
        assert self.exchange is not None  # as where messages are only counted
        return self.exchange.post(sends, receives)


def _heads(x: torch.Tensor, share: range) -> torch.Tensor:
    """These heads of `[tokens, H, D]`."""
    return x[:, share.start : share.stop]


class _Message(NamedTuple):
    """Some tokens and heads of tensors: `blocks`, `[tokens, heads, D]` a tensor, which are views of `parts`, one a
    dtype."""

    parts: Sequence[torch.Tensor]
    blocks: Sequence[torch.Tensor]


def _empty(like: Sequence[torch.Tensor], tokens: int, heads: Sequence[range]) -> _Message:
    """A message to be filled, of tensors like `[..., D]`."""
    widths = [len(share) * x.shape[-1] for x, share in zip(like, heads)]
    parts, blocks = [], {}
    for dtype in dict.fromkeys(x.dtype for x in like):
        alike = [index for index, x in enumerate(like) if x.dtype == dtype]
        parts.append(like[alike[0]].new_empty(tokens, sum(widths[index] for index in alike)))
        for index, block in zip(alike, parts[-1].split([widths[index] for index in alike], dim=1)):
            blocks[index] = block.unflatten(1, (len(heads[index]), like[index].shape[-1]))
    return _Message(parts, [blocks[index] for index in range(len(like))])


def _filled(tensors: Sequence[torch.Tensor]) -> _Message:
    """A message of these tensors `[tokens, heads, D]`. One alone is its own message."""
    if len(tensors) == 1:
        return _Message([tensors[0].flatten(1)], tensors)
    message = _empty(tensors, len(tensors[0]), [range(x.shape[1]) for x in tensors])
    for block, x in zip(message.blocks, tensors):
        block.copy_(x)
    return message
