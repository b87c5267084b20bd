"""All heads of some tokens for all tokens of some heads, and back: attention shares its work by head.

The all-to-all is that of Jacobs et al., "DeepSpeed Ulysses" (2023, arXiv:2309.14509). Heads need not divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from .exchange import Exchange

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


class SharedHeads:
    """Attention's tensors on their way between all heads of a rank's tokens and all tokens of a rank's heads.

    Args:
        tokens: which tokens travel.
        heads, key_heads: of a layer. A key head goes to each rank that has queries of it.
        device: of the tensors.
    """

    def __init__(self, tokens: TokenExchange, heads: int, key_heads: int, device: torch.device):
        self._tokens, self._totals = tokens, (heads, key_heads)
        ratio = heads // key_heads
        self._queries = deal_heads(heads, len(tokens.counts))
        self._keys = grouped_heads(self._queries, ratio)
        self.mine = self._queries[tokens.rank]
        self._are_shared = sum(map(len, self._keys)) > key_heads
        self._reads = reads_of(self.mine, ratio, device)

    @property
    def key_heads(self) -> int:
        """Key heads that this rank computes with."""
        return len(self.mine) if self._reads is not None else len(self._keys[self._tokens.rank])

    def leaving(self, query_dim: int, key_value_dim: int = 0) -> int:
        """How many numbers this rank sends for tensors of such dims on the way to heads."""
        queries, keys = self._elsewhere(self._queries), self._elsewhere(self._keys)
        count = self._tokens.counts[self._tokens.rank]
        return count * (sum(map(len, queries)) * query_dim + sum(map(len, keys)) * key_value_dim)

    def returning(self, query_dim: int, key_value_dim: int = 0) -> int:
        """The same on the way back to tokens."""
        keys = self._keys[self._tokens.rank]
        return sum(self._elsewhere(self._tokens.counts)) * (len(self.mine) * query_dim + len(keys) * key_value_dim)

    def _elsewhere(self, by_rank: Sequence) -> list:
        return [value for rank, value in enumerate(by_rank) if rank != self._tokens.rank]

    def gradient_dtype(self, key_value: torch.dtype, sums: torch.dtype) -> torch.dtype:
        """What gradients of keys travel in: those of a head that several ranks have are parts of a sum."""
        return sums if self._are_shared else key_value

    def to_heads(self, query: torch.Tensor, key_value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, H, D]` and `[T, H_kv, D + D_v]` as `[T_all, h, D]` and `[T_all, h_kv, D + D_v]`; h_kv divides h."""
        query, key_value = self._tokens.to_heads([query, key_value], [self._queries, self._keys])
        if self._reads is not None:
            key_value = key_value.index_select(1, self._reads)
        return query, key_value

    def to_tokens(self, grad_query: torch.Tensor, grad_key_value: torch.Tensor) -> list[torch.Tensor]:
        """The transpose of `to_heads`: sums over the ranks and queries that a key head went to."""
        if self._reads is not None:
            count = len(self._keys[self._tokens.rank])
            grad = grad_key_value.new_zeros(len(grad_key_value), count, grad_key_value.shape[2])
            grad_key_value = grad.index_add_(1, self._reads, grad_key_value)
        return self._tokens.to_tokens([grad_query, grad_key_value], [self._queries, self._keys], self._totals)

    def output_to_heads(self, output: torch.Tensor) -> torch.Tensor:
        """`[T, H, D_v]` as `[T_all, h, D_v]`: the transpose of `output_to_tokens`."""
        return self._tokens.to_heads([output], [self._queries])[0]

    def output_to_tokens(self, output: torch.Tensor) -> torch.Tensor:
        """`[T_all, h, D_v]` as `[T, H, D_v]`, 0 for tokens that do not travel."""
        return self._tokens.to_tokens([output], [self._queries], self._totals[:1])[0]


@dataclass(frozen=True)
class TokenExchange:
    """Which tokens the ranks of a group exchange.

    Args:
        exchange: the group's messages.
        rank: this rank in it.
        rows: how many rows this rank's tensors have.
        tokens: `[n]`, which of them travel; None for all.
        counts: for each rank, how many tokens travel from there.
        places: for each rank, the rows that its tokens have among all tokens: `[count]`.
        whole: how many rows all tokens have. Those that are nobody's place are 0.
    """

    exchange: Exchange
    rank: int
    rows: int
    tokens: torch.Tensor | None
    counts: Sequence[int]
    places: Sequence[torch.Tensor]
    whole: int

    def to_heads(self, tensors: Sequence[torch.Tensor], dealt: Sequence[Dealt]) -> list[torch.Tensor]:
        """Each `[rows, H, D]` as `[whole, h, D]`: all tokens of the heads that this rank is dealt.

        Args:
            dealt: for each tensor and each rank, the heads that go there.
        """
        sources = [x if self.tokens is None else x.index_select(0, self.tokens) for x in tensors]
        sent = [_empty(sources, self.counts[self.rank], [d[rank] for d in dealt]) for rank in self._ranks]
        for message, *heads in zip(sent, *dealt):
            for block, x, share in zip(message.blocks, sources, heads):
                block.copy_(x[:, share.start : share.stop])
        received = [_empty(tensors, count, [d[self.rank] for d in dealt]) for count in self.counts]
        received = self._swapped(sent, received)
        make = torch.Tensor.new_empty if sum(self.counts) == self.whole else torch.Tensor.new_zeros
        results = [make(x, (self.whole, len(d[self.rank]), x.shape[2])) for x, d in zip(tensors, dealt)]
        for message, places in zip(received, self.places):
            for result, block in zip(results, message.blocks):
                result.index_copy_(0, places, block)
        return results

    def to_tokens(
        self, tensors: Sequence[torch.Tensor], dealt: Sequence[Dealt], totals: Sequence[int]
    ) -> list[torch.Tensor]:
        """Each `[whole, h, D]` as `[rows, H, D]`, H of `totals`: the transpose of `to_heads`.

        What the ranks have of a head that went to several is added up, and tokens that do not travel are 0.
        """
        sent = [_filled([x.index_select(0, places) for x in tensors]) for places in self.places]
        count = self.counts[self.rank]
        received = self._swapped(sent, [_empty(tensors, count, [d[rank] for d in dealt]) for rank in self._ranks])
        results = []
        for index, (x, shares, total) in enumerate(zip(tensors, dealt, totals)):
            once = sum(map(len, shares)) == total
            result = (x.new_empty if once else x.new_zeros)(count, total, x.shape[2])
            for message, share in zip(received, shares):
                there, block = result[:, share.start : share.stop], message.blocks[index]
                there.copy_(block) if once else there.add_(block)
            if self.tokens is not None:
                result = x.new_zeros(self.rows, *result.shape[1:]).index_copy_(0, self.tokens, result)
            results.append(result)
        return results

    @property
    def _ranks(self) -> range:
        return range(len(self.counts))

    def _swapped(self, sent: list[_Message], received: list[_Message]) -> list[_Message]:
        """Message r of `sent` to rank r for message r of `received`; its own stays with this rank."""
        received[self.rank] = sent[self.rank]
        sends, receives = (
            [(rank, part) for rank in self._ranks if rank != self.rank for part in side[rank].parts if part.numel()]
            for side in (sent, received)
        )
        self.exchange.post(sends, receives).wait()
        return received


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
