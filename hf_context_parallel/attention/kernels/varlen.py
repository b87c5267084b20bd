"""What the CUDA flash-attention kernels share: segments as one call over packed rows and cumulative lengths.

FlashAttention takes head dims up to 256 that 8 divides, the same for query, key and value, in bfloat16 or float16.
Other head dims are padded with zeros, which changes neither scores nor outputs.
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
    """Cumulative lengths of query and key ranges, `[segments + 1]` int32, and what none of them is longer than.

    In the order in which all varlen kernels take them.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int


class Window(NamedTuple):
    """A band as FlashAttention takes it: bottom-right aligned, -1 for no limit."""

    causal: bool
    left: int
    right: int


class VarlenKernel(Kernel):
    """A kernel that takes all segments of a call at once."""

    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        if device.type != "cuda":
            return f"it runs on CUDA and the tensors are on {device}; use kernel='auto'"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
            return (
                f"it takes GPUs from compute capability 8.0 (Ampere) on, and {torch.cuda.get_device_name(device)} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; use kernel='reference'"
            )
        if dtype not in (torch.bfloat16, torch.float16):
            return (
                f"it takes bfloat16 and float16, not {dtype}; train with bf16=True (autocast), or load the model with "
                "dtype=torch.bfloat16, or accept a matrix of scores with kernel='reference'"
            )
        if max(query_dim, value_dim) > 256:
            return f"it takes head dims up to 256, not {max(query_dim, value_dim)}; use kernel='reference'"
        if scores.dropout_p:
            return (
                f"it does not tell which weights a dropout of {scores.dropout_p} left out; set attention dropout to "
                "0, or use kernel='reference'"
            )
        return None

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
        """Output `[Q, H, D]` and LSE `[H, Q]` of packed rows."""

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
        """The gradients of packed `query`, `key` and `value`, given LSE `[H, Q]`."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = _head_dim(query, value)
        output, lse = self.varlen_forward(
            _pad(take(query, segments.query_runs), width),
            _pad(take(key, segments.key_runs), width),
            _pad(take(value, segments.key_runs), width),
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
        width = _head_dim(query, value)
        grad_query, grad_key, grad_value = self.varlen_backward(
            _pad(take(grad_output, segments.query_runs), width),
            _pad(take(query, segments.query_runs), width),
            _pad(take(key, segments.key_runs), width),
            _pad(take(value, segments.key_runs), width),
            _pad(take(output, segments.query_runs), width),
            take(lse, segments.query_runs).T.contiguous(),
            _lengths(segments, query.device),
            _window(segments),
            scores,
        )
        query_dim, value_dim = query.shape[-1], value.shape[-1]
        return grad_query[..., :query_dim], grad_key[..., :query_dim], grad_value[..., :value_dim]


def _lengths(segments: Segments, device: torch.device) -> Lengths:
    """A call's lengths, made once for a stream: a layer finds them on the device."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in segments.kept:
        sides = segments.queries, segments.keys
        longest_query, longest_key = (max(stop - start for start, stop in side) for side in sides)
        if segments.band not in (FULL, CAUSAL):
            # FlashAttention takes a window without a right limit for one of `max_keys`, and one of `max_keys` or more
            # for none (`set_params_fprop`, `mha_varlen_fwd`). Both are so only where no range of queries is longer.
            longest_key = max(longest_key, longest_query)
        cu_queries, cu_keys = (_cumulative(side, device) for side in sides)
        segments.kept[device, stream] = Lengths(cu_queries, cu_keys, longest_query, longest_key)
    lengths: Lengths = segments.kept[device, stream]
    return lengths


def _cumulative(ranges: tuple[Interval, ...], device: torch.device) -> torch.Tensor:
    """0 and the running sum of the ranges' lengths."""
    lengths = torch.tensor([0, *(stop - start for start, stop in ranges)], dtype=torch.int32)
    cumulative = lengths.cumsum(0, dtype=torch.int32)
    return cumulative.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else cumulative.to(device)


def _window(segments: Segments) -> Window:
    left, right = (-1 if limit is None else limit for limit in segments.band)
    return Window(right == 0, left, right)


def _head_dim(query: torch.Tensor, value: torch.Tensor) -> int:
    """The least head dim that holds both and that 8 divides."""
    return -(-max(query.shape[-1], value.shape[-1]) // 8) * 8


def aligned(tensor: torch.Tensor) -> bool:
    """Whether every row begins where kernels can load 16 bytes at a time."""
    return all(start * tensor.itemsize % 16 == 0 for start in (tensor.storage_offset(), *tensor.stride()[:-1]))


def _pad(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """`tensor` with zeros up to `width` in its last dimension, and where kernels can load 16 bytes at a time.

    A view of packed keys and values can not be where another dim than `width` lies beside it.
    """
    if tensor.shape[-1] == width and aligned(tensor):
        return tensor
    padded = tensor.new_zeros(*tensor.shape[:-1], width)
    padded[..., : tensor.shape[-1]] = tensor
    return padded
