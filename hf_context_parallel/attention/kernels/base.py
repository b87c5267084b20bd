"""Interface of a kernel: attention on tiles, with its log-sum-exp (LSE)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...planning.intervals import Interval
from ...planning.tiles import FULL, Band, Segments
from ..scores import Scores


class Kernel(ABC):
    """Kernel that computes attention of query ranges to key ranges on one device.

    Tensors have tokens first: query `[T, H, D]`, key `[K, H_kv, D]`, value `[K, H_kv, D_v]`, where H_kv divides H.
    The last dimension has stride 1. No range is empty. A kernel writes to none of them: other ranks may read them, and
    on CPUs keys of other ranks are mapped for reading only.
    """

    name: str

    @staticmethod
    @abstractmethod
    def missing() -> str | None:
        """Reason why the kernel cannot be used on this machine and how to get it, or None if it can."""

    @abstractmethod
    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        """Reason why the kernel cannot compute such tensors or scores and what to do, or None if it can."""

    @abstractmethod
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the output `[Q, H, D_v]` and the natural-log LSE `[Q, H]` of the query ranges, in order.

        Q counts the rows of all query ranges. The output is in the dtype of the inputs or a wider one, the LSE in
        float32 or a wider one.
        """

    @abstractmethod
    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the parts of the gradients that come from these tiles.

        The output and the LSE are given over *all* keys that the queries read.

        Args:
            grad_output, output: `[T, H, D_v]`, of all tokens, as in `query`.
            lse: `[T, H]`, of all tokens.

        Returns:
            The gradients of the query ranges `[Q, H, D]` and of the key ranges `[R, H_kv, D]` and `[R, H_kv, D_v]`,
            ranges in order. R counts the rows of all key ranges.
        """


class Block(NamedTuple):
    """Some queries of a tile, and the keys that they read: query i reads key j if `i + low <= j <= i + high`.

    Ranges index the queries and keys of the tile, i and j those of the block. None means no limit.
    """

    query: Interval
    key: Interval
    low: int | None
    high: int | None

    def hidden(self, device: torch.device) -> torch.Tensor | None:
        """Boolean mask `[Q, K]` of the keys that the queries do not read, or None if they read all keys."""
        if self.low is None and self.high is None:
            return None
        rows, columns = (stop - start for start, stop in (self.query, self.key))
        distance = torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.low is not None:
            hidden |= distance < self.low
        if self.high is not None:
            hidden |= distance > self.high
        return hidden


def blocks(queries: int, keys: int, band: Band, most: int) -> Iterator[Block]:
    """Cut a tile into blocks of at most `most` queries.

    This is for kernels that store something for every pair. So the pairs outside of a window cost nothing, and memory
    does not grow with the square of the tile.
    """
    shift = keys - queries
    for start in range(0, queries, most):
        stop = min(start + most, queries)
        first = 0 if band.left is None else max(0, start + shift - band.left)
        last = keys if band.right is None else min(keys, stop + shift + band.right)
        low = None if band.left is None else shift - band.left + start - first
        high = None if band.right is None else shift + band.right + start - first
        # A limit that hides no key of the block is dropped.
        low = None if low is None or low + (stop - start) - 1 <= 0 else low
        high = None if high is None or high >= last - first - 1 else high
        yield Block((start, stop), (first, last), low, high)


def is_plain(queries: int, keys: int, band: Band) -> bool:
    """Return True if a tile is read entirely, or is a square with a causal mask."""
    return band == FULL or (band.left is None and band.right == 0 and queries == keys)
