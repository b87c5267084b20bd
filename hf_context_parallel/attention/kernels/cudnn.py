"""cuDNN's attention, by PyTorch's operators: on Hopper 1.6 to 1.8 times as fast as FlashAttention-2
(`benchmarks/results/gpu_suite.md`).

It takes calls of one long segment, read entirely or causally on a square, which are all calls of one long document.
PyTorch's flash attention takes the others: windows, packed documents, short tiles. cuDNN makes a plan for each shape
that it has not seen, in up to a second and once a thread, so it pays where shapes repeat.
"""

from __future__ import annotations

import torch

from ...planning.tiles import Segments, take
from ..scores import Scores
from .base import is_plain
from .torch_cuda import TorchKernel
from .varlen import aligned

SHORTEST = 1024
"""Queries and keys from which a tile is worth a plan."""


class CudnnKernel(TorchKernel):
    name = "cudnn"

    @staticmethod
    def missing() -> str | None:
        missing = TorchKernel.missing()
        if missing is None and not torch.backends.cudnn.is_available():
            missing = "this PyTorch was built without cuDNN; use kernel='torch'"
        return missing

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _takes(query, value, segments, scores):
            return super().forward(query, key, value, segments, scores)
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            _heads_first(query, segments.query_runs),
            _heads_first(key, segments.key_runs),
            _heads_first(value, segments.key_runs),
            None,
            True,
            0.0,
            segments.band.right == 0,
            scale=scores.scale,
        )
        return output[0].transpose(0, 1), lse.reshape(query.shape[1], -1).T

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
        if not _takes(query, value, segments, scores):
            return super().backward(grad_output, query, key, value, output, lse, segments, scores)
        queries, keys = segments.query_runs, segments.key_runs
        unused = torch.empty((), dtype=torch.int64, device=query.device)  # the state of a dropout that is 0
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _heads_first(grad_output, queries),
            _heads_first(query, queries),
            _heads_first(key, keys),
            _heads_first(value, keys),
            _heads_first(output, queries),
            take(lse, queries).T[None, :, :, None].contiguous(),
            unused,
            unused,
            None,
            None,
            None,
            _length(segments.queries[0]),
            _length(segments.keys[0]),
            0.0,
            segments.band.right == 0,
            scale=scores.scale,
        )
        grad_query, grad_key, grad_value = (grad[0].transpose(0, 1) for grad in grads)
        return grad_query, grad_key, grad_value


def _takes(query: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores) -> bool:
    """Whether cuDNN computes a call. Where the same bits are asked for, PyTorch's kernel promises them."""
    if len(segments.queries) > 1 or scores.deterministic:
        return False
    if any(tensor.shape[-1] % 8 or tensor.shape[-1] > _widest_head(query.device) for tensor in (query, value)):
        return False
    queries, keys = _length(segments.queries[0]), _length(segments.keys[0])
    return min(queries, keys) >= SHORTEST and is_plain(queries, keys, segments.band)


def _widest_head(device: torch.device) -> int:
    """The largest head dim that cuDNN's backward takes."""
    return 256 if torch.cuda.get_device_capability(device) >= (9, 0) else 128


def _length(interval: tuple[int, int]) -> int:
    return interval[1] - interval[0]


def _heads_first(tensor: torch.Tensor, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """`[T, H, D]` as `[1, H, rows of runs, D]`, where kernels can load 16 bytes at a time."""
    rows = take(tensor, runs)
    return (rows if aligned(rows) else rows.contiguous()).transpose(0, 1)[None]
