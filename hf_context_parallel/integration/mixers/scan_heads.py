"""Whole sequences of some heads: what runs along a sequence, head by head, shares its work by head.

Each rank gets all tokens of its share of the heads, in place of all heads of its share of the tokens. All tensors of a
kind travel together, and results return the other way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...data.shard import Shard
from ...distributed.messages import Exchange
from ...distributed.rows import Rows
from ...distributed.token_exchange import TokenExchange, grouped_heads, reads_of
from .resharding import held, linear, sequences


class Heads:
    """The exchange that gives each rank whole sequences of some heads, and its reverse.

    Args:
        shard: the batch as this rank has it.
        exchange: the messages of the shard's ranks.

    `sequences` are all of the batch's, shortest first.
    """

    def __init__(self, shard: Shard, exchange: Exchange):
        self.sequences = sorted(sequences(shard), key=lambda sequence: sequence.length)
        by_rank = held(shard, self.sequences)
        counts = [len(tokens) for tokens, _ in by_rank]
        self._local = shard.local_shape
        self._tokens = TokenExchange(
            exchange=exchange,
            rank=shard.rank,
            rows=self._local[0] * self._local[1],
            tokens=Rows(by_rank[shard.rank][0]),
            counts=counts,
            places=[Rows(places) for _, places in by_rank],
            whole=sum(counts),
        )

    def whole(self, tensors: Sequence[torch.Tensor], shares: Sequence[range]) -> list[torch.Tensor]:
        """Each `[B, S_local, H, ...]` as the tokens of all sequences, one sequence after another: `[T, h, ...]`.

        Args:
            shares: for each rank, which heads of the first tensor go there. Of tensors with fewer heads it gets those
                that they share, for each of its own where its heads would not share them equally.
        """
        ratios = [tensors[0].shape[2] // x.shape[2] for x in tensors]
        dealt = [grouped_heads(shares, ratio) for ratio in ratios]
        totals = [x.shape[2] for x in tensors]
        whole = linear(
            lambda *xs: self._tokens.to_heads(xs, dealt),
            lambda *xs: self._tokens.to_tokens(xs, dealt, totals),
            *(_flat(x.flatten(0, 1)) for x in tensors),
        )
        whole = [x.reshape(*x.shape[:2], *like.shape[3:]) for x, like in zip(whole, tensors)]
        reads = [reads_of(shares[self._tokens.rank], ratio, x.device) for ratio, x in zip(ratios, whole)]
        return [x if read is None else x.index_select(1, read) for x, read in zip(whole, reads)]

    def sharded(self, x: torch.Tensor, shares: Sequence[range]) -> torch.Tensor:
        """`[T, h, ...]` back as `[B, S_local, H, ...]`: 0 where a token is in no sequence.

        Args:
            shares: for each rank the heads that it comes with.
        """
        total = sum(map(len, shares))
        (local,) = linear(
            lambda x: self._tokens.to_tokens([x], [shares], [total]),
            lambda x: self._tokens.to_heads([x], [shares]),
            _flat(x),
        )
        return local.reshape(*self._local, total, *x.shape[2:])


def _flat(x: torch.Tensor) -> torch.Tensor:
    """`[T, H, ...]` as `[T, H, D]`."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)
