"""Base class of the CUDA flash-attention kernels: one call over packed rows with cumulative lengths.

FlashAttention takes head dims that are multiples of 8, up to 256. The dtype is bfloat16 or float16. Other head dims
are padded with zeros, which changes neither scores nor outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch

from ...planning.intervals import Interval
from ...planning.tiles import CAUSAL, FULL, Segments, take
from ..scores import Scores
from .base import Kernel


class Lengths(NamedTuple):
    """Cumulative lengths of query and key ranges, `[segments + 1]` int32, and upper bounds of the lengths.

    The order is that of the arguments of varlen kernels.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int


class Window(NamedTuple):
    """Band in the form of FlashAttention: aligned at the bottom right. None means no limit."""

    causal: bool
    left: int | None
    right: int | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Left and right limit, with -1 for no limit."""
        return -1 if self.left is None else self.left, -1 if self.right is None else self.right


class VarlenKernel(Kernel):
    """Kernel that computes all segments of a call at once."""

    devices = "8.0 (Ampere) or later"
    """Compute capabilities that `runs_on` takes, in words."""

    @staticmethod
    def runs_on(capability: tuple[int, int]) -> bool:
        """Return True if the kernel runs on devices of a compute capability."""
        return capability >= (8, 0)

    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        if device.type != "cuda":
            return f"it runs on CUDA, but the tensors are on {device}. Use kernel='auto'"
        if torch.cuda.is_available() and not self.runs_on(torch.cuda.get_device_capability(device)):
            return (
                f"it needs compute capability {self.devices}, and {torch.cuda.get_device_name(device)} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}. Use kernel='auto', or "
                "kernel='reference', which runs everywhere, but slowly"
            )
        if dtype not in (torch.bfloat16, torch.float16):
            return (
                f"it takes bfloat16 and float16, not {dtype}. Train with bf16=True (autocast), or load the model with "
                "dtype=torch.bfloat16, or use kernel='reference', which is slow"
            )
        if max(query_dim, value_dim) > 256:
            return f"it takes head dims up to 256, not {max(query_dim, value_dim)}. Use kernel='reference'"
        if scores.dropout_p:
            return (
                f"it does not report which weights a dropout of {scores.dropout_p} dropped. Set attention dropout to "
                "0, or use kernel='reference'"
            )
        return None

    def head_dims(self, query: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
        """Head dims of query and value to which these tensors are padded: the same multiple of 8, unless overridden.

        Args:
            query: `[T, H, D]`.
            value: `[K, H_kv, D_v]`.
        """
        width = multiple(max(query.shape[-1], value.shape[-1]), 8)
        return width, width

    @abstractmethod
    def varlen_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Lengths,
        window: Window,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute output `[Q, H, D_v]` and LSE `[H, Q]` of packed rows."""

    @abstractmethod
    def varlen_backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        lengths: Lengths,
        window: Window,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the gradients of packed `query`, `key` and `value`, given the LSE `[H, Q]`."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query_dim, value_dim = self.head_dims(query, value)
        output, lse = self.varlen_forward(
            _pad(take(query, segments.query_runs), query_dim),
            _pad(take(key, segments.key_runs), query_dim),
            _pad(take(value, segments.key_runs), value_dim),
            _lengths(segments, query.device),
            _window(segments),
            scores,
        )
        return output[..., : value.shape[-1]], lse.T

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
        query_dim, value_dim = self.head_dims(query, value)
        grad_query, grad_key, grad_value = self.varlen_backward(
            _pad(take(grad_output, segments.query_runs), value_dim),
            _pad(take(query, segments.query_runs), query_dim),
            _pad(take(key, segments.key_runs), query_dim),
            _pad(take(value, segments.key_runs), value_dim),
            _pad(take(output, segments.query_runs), value_dim),
            take(lse, segments.query_runs).T.contiguous(),
            _lengths(segments, query.device),
            _window(segments),
            scores,
        )
        query_dim, value_dim = query.shape[-1], value.shape[-1]
        return grad_query[..., :query_dim], grad_key[..., :query_dim], grad_value[..., :value_dim]


def _lengths(segments: Segments, device: torch.device) -> Lengths:
    """Lengths of a call on the device. They are made once for each stream, and every layer uses them."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in segments.kept:
        sides = segments.queries, segments.keys
        longest_query, longest_key = (max(stop - start for start, stop in side) for side in sides)
        if segments.band not in (FULL, CAUSAL):
            # FlashAttention-2 replaces a missing right limit of a window by `max_keys`, and drops a limit of
            # `max_keys` or more (`set_params_fprop`, `mha_varlen_fwd`). Both are right only if no query range is
            # longer.
            longest_key = max(longest_key, longest_query)
        cu_queries, cu_keys = (_cumulative(side, device) for side in sides)
        segments.kept[device, stream] = Lengths(cu_queries, cu_keys, longest_query, longest_key)
    lengths: Lengths = segments.kept[device, stream]
    return lengths


def _cumulative(ranges: tuple[Interval, ...], device: torch.device) -> torch.Tensor:
    """Cumulative lengths of the ranges, beginning with 0."""
    lengths = torch.tensor([0, *(stop - start for start, stop in ranges)], dtype=torch.int32)
    cumulative = lengths.cumsum(0, dtype=torch.int32)
    return cumulative.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else cumulative.to(device)


def _window(segments: Segments) -> Window:
    return Window(segments.band.right == 0, *segments.band)


def multiple(number: int, of: int) -> int:
    """Smallest multiple of `of` that is no less than a number."""
    return -(-number // of) * of


def latent_dims(query: torch.Tensor, value: torch.Tensor) -> tuple[int, int] | None:
    """Head dims of multi-head latent attention, which later versions of FlashAttention take as they are, or None."""
    query_dim, value_dim = (multiple(tensor.shape[-1], 8) for tensor in (query, value))
    return (query_dim, value_dim) if 128 < query_dim <= 192 and 96 < value_dim <= 128 else None


def aligned(tensor: torch.Tensor) -> bool:
    """Return True if every row is aligned so that kernels can load 16 bytes at a time."""
    return all(start * tensor.itemsize % 16 == 0 for start in (tensor.storage_offset(), *tensor.stride()[:-1]))


def _pad(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Pad the last dimension to `width` with zeros, in memory from which kernels can load 16 bytes at a time.

    A view of packed keys/values may be unaligned if the head dim beside it is not `width`.
    """
    if tensor.shape[-1] == width and aligned(tensor):
        return tensor
    padded = tensor.new_zeros(*tensor.shape[:-1], width)
    padded[..., : tensor.shape[-1]] = tensor
    return padded
