"""What a strategy asks of a kernel: attention on tiles, with its log-sum-exp (LSE)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..planning.intervals import Interval
from ..planning.tiles import FULL, Band, Segments


class Scores(NamedTuple):
    """How the score of a query and a key is made, and what becomes of the weights.

    Args:
        scale: what their product is multiplied with.
        softcap: c of `c * tanh(score / c)`, or None.
        dropout_p: the probability that a weight is left out, the others growing by 1 / (1 - dropout_p).
        seed: of which weights are left out. A kernel that is called with the same seed leaves out the same.
        deterministic: the same bits from the same tensors.
    """

    scale: float
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int = 0
    deterministic: bool = False

    def of(self, *part) -> Scores:
        """These for a part of the work that has a name, with a seed of its own."""
        return self._replace(seed=seed_of(self.seed, *part)) if self.dropout_p else self


def seed_of(*numbers) -> int:
    """63 bits that differ wherever the numbers do."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_scores(
    query: torch.Tensor, scale: float | None, softcap: float | None, dropout_p: float, deterministic: bool
) -> Scores:
    """Scores as a caller asks for them. Dropout's seed is drawn from torch's default generator, on the host.

    Raises:
        ValueError: naming the value that cannot be.
    """
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap!r} must be greater than 0 and finite, or None for none.")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p!r} must be at least 0 and less than 1.")
    seed = int(torch.empty((), dtype=torch.int64).random_()) if dropout_p else 0
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Scores(scale, softcap, dropout_p, seed, deterministic)


class Kernel(ABC):
    """Attention of query ranges to key ranges on one device.

    Tensors have tokens first: query `[T, H, D]`, key `[K, H_kv, D]`, value `[K, H_kv, D_v]`, with H_kv dividing H and
    the last dimension's stride 1. No range is empty.
    """

    name: str

    @staticmethod
    @abstractmethod
    def missing() -> str | None:
        """None if the kernel can be used here, or what is missing and how to get it."""

    @abstractmethod
    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        """None if the kernel takes tensors like these and makes such scores, or why it does not and what to do."""

    @abstractmethod
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `[Q, H, D_v]` and natural-log LSE `[Q, H]`, where Q counts the query ranges' rows, in order.

        They are in the inputs' dtype or a wider one, the LSE in float32 at least.
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
        """The tiles' share of the gradients, given the output and LSE over *all* keys that the queries read.

        Args:
            grad_output, output: `[T, H, D_v]`, of all tokens, as `query` is.
            lse: `[T, H]`, of all tokens.

        Returns:
            The gradients of the query ranges `[Q, H, D]` and of the key ranges `[K, H_kv, D]` and `[K, H_kv, D_v]`,
            ranges in order.
        """


class Block(NamedTuple):
    """Some queries of a tile, and the keys that they read: query i reads key j if `i + low <= j <= i + high`.

    Ranges are of the tile's own; None is no limit.
    """

    query: Interval
    key: Interval
    low: int | None
    high: int | None

    def hidden(self, device: torch.device) -> torch.Tensor | None:
        """Which keys the queries do not read, `[Q, K]`, or None if they read all."""
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
    """A tile in blocks of `most` queries: for kernels that keep something for every pair, so that a window costs what
    it holds and memory does not grow with the square of the tile."""
    shift = keys - queries
    for start in range(0, queries, most):
        stop = min(start + most, queries)
        first = 0 if band.left is None else max(0, start + shift - band.left)
        last = keys if band.right is None else min(keys, stop + shift + band.right)
        low = None if band.left is None else shift - band.left + start - first
        high = None if band.right is None else shift + band.right + start - first
        # What binds none of the block's queries is no limit.
        low = None if low is None or low + (stop - start) - 1 <= 0 else low
        high = None if high is None or high >= last - first - 1 else high
        yield Block((start, stop), (first, last), low, high)


def is_plain(queries: int, keys: int, band: Band) -> bool:
    """Whether a tile is read entirely, or by a causal mask on a square."""
    return band == FULL or (band.left is None and band.right == 0 and queries == keys)
