"""Kernel `cudnn`: attention of cuDNN, called by PyTorch's operators.

On Hopper it is 1.6 to 2.1 times as fast as FlashAttention-2 (`benchmarks/results/h200.md`). It computes calls of
few long segments that are read entirely or have a causal mask. PyTorch's operators align such a mask with the first
key. So a causal tile with more keys than queries, as `all_gather` has, is two calls: the keys that all queries read,
and a square. FlashAttention-2 computes windows, packed documents, softcap and short tiles.

cuDNN compiles a plan for each new shape, once in each thread, in up to 1.4 s. So `auto` gives it a shape only when the
calls of this shape so far would have saved as much. Compiling then costs at most as much as it could have saved, and
lengths that do not come back are not compiled.
"""

from __future__ import annotations

import threading
from itertools import chain

import torch

from ...distributed.rows import Rows
from ...planning.intervals import Interval
from ...planning.machine import BACKWARD, attention_flops
from ...planning.tiles import CAUSAL, FULL, Band, Segments, take
from ..scores import Scores
from ..totals import combining
from .base import Kernel, is_plain
from .flash_attn import FlashAttnKernel
from .torch_cuda import TorchKernel
from .varlen import aligned

SHORTEST = 1024
"""Fewest queries and keys of a tile for which cuDNN is used."""
MOST_SEGMENTS = 8
"""Most segments of a call that cuDNN computes, one after another. FlashAttention-2 computes more of them at once."""
PAYS = 1e15
"""Floating-point operations on which cuDNN saves the time of compiling. On an H100 it takes 1.3 to 1.4 s less than
FlashAttention-2 for them (347 and 626 TFLOP/s forward, 310 and 553 backward: `benchmarks/results/h100.md`)."""
MOST_SHAPES = 4096
"""Shapes whose operations are counted, the last ones that were used."""


class CudnnKernel(Kernel):
    """Kernel of cuDNN, with one of FlashAttention-2 for the calls that cuDNN does not take.

    Args:
        compiles_at_once: True to compile each shape in its first call, False when it has paid.
    """

    name = "cudnn"

    def __init__(self, compiles_at_once: bool = True):
        self.other = FlashAttnKernel() if FlashAttnKernel.missing() is None else TorchKernel()
        self._counted = None if compiles_at_once else _Counted()

    @staticmethod
    def missing() -> str | None:
        missing = TorchKernel.missing()
        if missing is None and not torch.backends.cudnn.is_available():
            missing = "this PyTorch was built without cuDNN. Use kernel='torch'"
        return missing

    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        return self.other.refusal(device, dtype, query_dim, value_dim, scores)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._takes("forward", query, key, value, segments, scores):
            return self.other.forward(query, key, value, segments, scores)
        parts = (_merged([_forward(query, key, value, call, scores) for call in calls]) for calls in _plain(segments))
        output, lse = (_cat(side) for side in zip(*parts))
        return output, lse

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
        if not self._takes("backward", query, key, value, segments, scores):
            return self.other.backward(grad_output, query, key, value, output, lse, segments, scores)
        arguments = grad_output, query, key, value, output, lse
        parts = (_added([_backward(*arguments, call, scores) for call in calls]) for calls in _plain(segments))
        grad_query, grad_key, grad_value = (_cat(side) for side in zip(*parts))
        return grad_query, grad_key, grad_value

    def _takes(
        self,
        side: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        scores: Scores,
    ) -> bool:
        """Return True if cuDNN computes a call, and count its operations if it may compute one like it later."""
        if not _can(query, value, segments, scores):
            return False
        if self._counted is None:
            return True
        tensors = tuple((tensor.dtype, tensor.shape[1:], tensor.stride()) for tensor in (query, key, value))
        pays = True
        for call in chain(*_plain(segments)):
            tile = _length(call.queries[0]), _length(call.keys[0]), call.band
            work = attention_flops(call.pairs, query.shape[1], query.shape[-1], value.shape[-1])
            work *= BACKWARD if side == "backward" else 1
            pays &= self._counted.add((side, query.device, *tensors, *tile), work) >= PAYS
        return pays


def _plain(segments: Segments) -> list[list[Segments]]:
    """Calls of one plain tile each, by segment. A causal tile with more keys than queries is two."""
    if "plain" not in segments.kept:
        segments.kept["plain"] = [
            _plain_tiles(query, key, segments.band) for query, key in zip(segments.queries, segments.keys)
        ]
    found: list[list[Segments]] = segments.kept["plain"]
    return found


def _plain_tiles(query: Interval, key: Interval, band: Band) -> list[Segments]:
    square = key[1] - _length(query)
    if band != CAUSAL or key[0] >= square:
        return [Segments((query,), (key,), band)]
    return [Segments((query,), ((key[0], square),)), Segments((query,), ((square, key[1]),), CAUSAL)]


def _merged(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge outputs and LSE of the same queries over different keys."""
    output, lse = parts[0]
    if len(parts) > 1:
        output, lse, every = output.contiguous(), lse.contiguous(), Rows.of_runs([(0, len(output))])
        for part, part_lse in parts[1:]:
            combining(part).merge_rows(output, part, output, lse, part_lse, every, every)
    return output, lse


def _added(parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add the gradients of the same queries, and join those of keys and values."""
    of_query, of_key, of_value = zip(*parts)
    return sum(of_query[1:], start=of_query[0]), _cat(of_key), _cat(of_value)


def _cat(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output `[Q, H, D_v]` and the LSE `[Q, H]` of one segment."""
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


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    segments: Segments,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of one segment, given the LSE over all keys."""
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


class _Counted(threading.local):
    """Operations of the calls of each shape, by thread, since a plan of cuDNN is compiled for one thread."""

    def __init__(self) -> None:
        self.work: dict[tuple[object, ...], float] = {}

    def add(self, shape: tuple[object, ...], work: float) -> float:
        """Count one more call of a shape, and return the operations of those before it."""
        before = self.work.pop(shape, 0.0)
        self.work[shape] = before + work  # as the last one that was used
        if len(self.work) > MOST_SHAPES:
            del self.work[next(iter(self.work))]
        return before


def _can(query: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores) -> bool:
    """Return True if cuDNN can compute a call.

    Deterministic calls go to the other kernel, which guarantees the same bits.
    """
    if scores.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    if len(segments.queries) > MOST_SEGMENTS or scores.softcap is not None:
        return False
    if any(tensor.shape[-1] % 8 or tensor.shape[-1] > _widest_head(query.device) for tensor in (query, value)):
        return False
    if segments.band not in (FULL, CAUSAL):
        return False
    tiles = [(_length(call.queries[0]), _length(call.keys[0]), call.band) for call in chain(*_plain(segments))]
    return all(min(queries, keys) >= SHORTEST and is_plain(queries, keys, band) for queries, keys, band in tiles)


def _widest_head(device: torch.device) -> int:
    """Largest head dim that the backward of cuDNN takes."""
    return 256 if torch.cuda.get_device_capability(device) == (9, 0) else 128


def _length(interval: tuple[int, int]) -> int:
    return interval[1] - interval[0]


def _heads_first(tensor: torch.Tensor, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Turn `[T, H, D]` into `[1, H, rows of runs, D]`, aligned so that kernels can load 16 bytes at a time."""
    rows = take(tensor, runs)
    return (rows if aligned(rows) else rows.contiguous()).transpose(0, 1)[None]
