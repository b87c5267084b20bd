"""Exchange of tokens for heads, for scans.

A scan runs along the sequence, for each head by itself. So ranks share its work by heads. Each rank holds all heads of
its own tokens, and gets all tokens of its own heads. All tensors of a scan travel in one exchange. Outputs return in
the reverse one.
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
    """Exchange that gives each rank whole sequences of some heads, and its reverse.

    The attribute `sequences` lists all sequences of the batch, shortest first.

    Args:
        shard: the shard of this rank.
        exchange: the messages of the CP group.
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
        """Exchange each `[B, S_local, H, ...]` for the tokens of all sequences, one after another: `[T, h, ...]`.

        Args:
            tensors: the first has the most heads. The others may have fewer: several heads of the first then read one
                of their heads.
            shares: heads of the first tensor that each rank gets. It also gets the heads of the other tensors that
                these read. Such a head is repeated for each reader, if not all heads have equally many readers on
                the rank.
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
        """Return `[T, h, ...]` to the shards, `[B, S_local, H, ...]`. Tokens of no sequence are 0.

        Args:
            x: the output of the scan for the heads of this rank.
            shares: heads that each rank has computed.
        """
        total = sum(map(len, shares))
        (local,) = linear(
            lambda x: self._tokens.to_tokens([x], [shares], [total]),
            lambda x: self._tokens.to_heads([x], [shares]),
            _flat(x),
        )
        return local.reshape(*self._local, total, *x.shape[2:])


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Reshape `[T, H, ...]` to `[T, H, D]`."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)
