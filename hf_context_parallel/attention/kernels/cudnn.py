"""Kernel `cudnn`: attention of cuDNN, called by PyTorch's operators.

On Hopper it is 1.6 to 1.8 times as fast as FlashAttention-2 (`benchmarks/results/gpu_suite.md`). It computes calls of
one long segment that is read entirely, or is a square with a causal mask. All calls of a ring over one long document
are such. PyTorch's flash attention computes the others: windows, packed documents, short tiles, and causal tiles of
`all_gather`, which have more keys than queries. cuDNN compiles a plan for each new shape, once in each thread, in up
to 1.4 s. So it is worth while if shapes repeat.
"""

from __future__ import annotations

import torch

from ...planning.tiles import Segments, take
from ..scores import Scores
from .base import is_plain
from .torch_cuda import TorchKernel
from .varlen import aligned

SHORTEST = 1024
"""Fewest queries and keys of a tile for which cuDNN is used."""


class CudnnKernel(TorchKernel):
    name = "cudnn"

    @staticmethod
    def missing() -> str | None:
        missing = TorchKernel.missing()
        if missing is None and not torch.backends.cudnn.is_available():
            missing = "this PyTorch was built without cuDNN. Use kernel='torch'"
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
        unused = torch.empty((), dtype=torch.int64, device=query.device)  # the random state, since dropout is 0
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
    """Return True if cuDNN computes a call.

    Deterministic calls go to PyTorch's kernel, which guarantees the same bits.
    """
    if len(segments.queries) > 1 or scores.deterministic:
        return False
    if any(tensor.shape[-1] % 8 or tensor.shape[-1] > _widest_head(query.device) for tensor in (query, value)):
        return False
    queries, keys = _length(segments.queries[0]), _length(segments.keys[0])
    return min(queries, keys) >= SHORTEST and is_plain(queries, keys, segments.band)


def _widest_head(device: torch.device) -> int:
    """Largest head dim that the backward of cuDNN takes."""
    return 256 if torch.cuda.get_device_capability(device) >= (9, 0) else 128


def _length(interval: tuple[int, int]) -> int:
    return interval[1] - interval[0]


def _heads_first(tensor: torch.Tensor, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Turn `[T, H, D]` into `[1, H, rows of runs, D]`, aligned so that kernels can load 16 bytes at a time."""
    rows = take(tensor, runs)
    return (rows if aligned(rows) else rows.contiguous()).transpose(0, 1)[None]
