"""What a strategy asks of a kernel: attention on tiles, with its log-sum-exp (LSE)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..plan import Segments


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
    def refusal(self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int) -> str | None:
        """None if the kernel takes tensors like these, or why it does not and what to do."""

    @abstractmethod
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
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
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tiles' share of the gradients, given the output and LSE over *all* keys that the queries read.

        Args:
            grad_output, output: `[T, H, D_v]`, of all tokens, as `query` is.
            lse: `[T, H]`, of all tokens.

        Returns:
            The gradients of the query ranges `[Q, H, D]` and of the key ranges `[K, H_kv, D]` and `[K, H_kv, D_v]`,
            ranges in order.
        """
