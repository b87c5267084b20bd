"""All heads of some tokens for all tokens of some heads, and back: attention shares its work by head.

The all-to-all is that of Jacobs et al., "DeepSpeed Ulysses" (2023, arXiv:2309.14509). Heads need not divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from ..distributed.token_exchange import TokenExchange, deal_heads, grouped_heads, reads_of

T = TypeVar("T")


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

    def _elsewhere(self, by_rank: Sequence[T]) -> list[T]:
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
