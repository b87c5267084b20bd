"""Exchange of heads: a rank gives all heads of its tokens, and gets all tokens of its heads.

The all-to-all is that of Jacobs et al., "DeepSpeed Ulysses" (2023, arXiv:2309.14509). The number of heads need not be
a multiple of the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from ..distributed.token_exchange import TokenExchange, deal_heads, grouped_heads, reads_of

T = TypeVar("T")


class SharedHeads:
    """Exchange between tensors with all heads of a rank's tokens and tensors with all tokens of a rank's heads.

    Args:
        tokens: exchange of the tokens that travel.
        heads, key_heads: heads of a layer. A key head goes to each rank whose query heads read it.
        device: device of the tensors.
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
        """Number of key heads that this rank computes with."""
        return len(self.mine) if self._reads is not None else len(self._keys[self._tokens.rank])

    def leaving(self, query_dim: int, key_value_dim: int = 0) -> int:
        """Number of elements that this rank sends in `to_heads`, for tensors with these head dims."""
        queries, keys = self._elsewhere(self._queries), self._elsewhere(self._keys)
        count = self._tokens.counts[self._tokens.rank]
        return count * (sum(map(len, queries)) * query_dim + sum(map(len, keys)) * key_value_dim)

    def returning(self, query_dim: int, key_value_dim: int = 0) -> int:
        """Number of elements that this rank sends in `to_tokens`, for tensors with these head dims."""
        keys = self._keys[self._tokens.rank]
        return sum(self._elsewhere(self._tokens.counts)) * (len(self.mine) * query_dim + len(keys) * key_value_dim)

    def _elsewhere(self, by_rank: Sequence[T]) -> list[T]:
        return [value for rank, value in enumerate(by_rank) if rank != self._tokens.rank]

    def gradient_dtype(self, key_value: torch.dtype, sums: torch.dtype) -> torch.dtype:
        """Dtype in which key gradients travel: `sums` if several ranks hold parts of the gradient of one head."""
        return sums if self._are_shared else key_value

    def to_heads(self, query: torch.Tensor, key_value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn `[T, H, D]` and `[T, H_kv, D + D_v]` into `[T_all, h, D]` and `[T_all, h_kv, D + D_v]`.

        T_all counts the tokens of the plan, h and h_kv the heads of this rank. h_kv divides h.
        """
        query, key_value = self._tokens.to_heads([query, key_value], [self._queries, self._keys])
        return query, self._by_query(key_value)

    def to_tokens(self, grad_query: torch.Tensor, grad_key_value: torch.Tensor) -> list[torch.Tensor]:
        """Transpose of `to_heads`: it sums over the ranks and the query heads that a key head went to."""
        if self._reads is not None:
            count = len(self._keys[self._tokens.rank])
            grad = grad_key_value.new_zeros(len(grad_key_value), count, grad_key_value.shape[2])
            grad_key_value = grad.index_add_(1, self._reads, grad_key_value)
        return self._tokens.to_tokens([grad_query, grad_key_value], [self._queries, self._keys], self._totals)

    def output_to_heads(self, output: torch.Tensor) -> torch.Tensor:
        """Turn `[T, H, D_v]` into `[T_all, h, D_v]`: the transpose of `output_to_tokens`."""
        return self._tokens.to_heads([output], [self._queries])[0]

    def all_to_heads(
        self, grad_output: torch.Tensor, output: torch.Tensor, query: torch.Tensor, key_value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turn all that backward needs at once, as `to_heads` and `output_to_heads` do apart."""
        dealt = [self._queries, self._queries, self._queries, self._keys]
        tensors = grad_output, output, query, key_value
        grad_output, output, query, key_value = self._tokens.to_heads(tensors, dealt)
        return grad_output, output, query, self._by_query(key_value)

    def _by_query(self, key_value: torch.Tensor) -> torch.Tensor:
        """Repeat key heads `[T_all, heads, D]` of this rank where its query heads read them unequally often."""
        return key_value if self._reads is None else key_value.index_select(1, self._reads)

    def output_to_tokens(self, output: torch.Tensor) -> torch.Tensor:
        """Turn `[T_all, h, D_v]` into `[T, H, D_v]`, which is 0 for tokens that do not travel."""
        return self._tokens.to_tokens([output], [self._queries], self._totals[:1])[0]
