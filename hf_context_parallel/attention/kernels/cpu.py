"""Kernel `cpu`: PyTorch's flash attention on the CPU. Its operators are called directly, since they return the LSE.

The operators are fast for contiguous `[1, H, S, D]` in float32. In bfloat16 their backward takes ten times as long, on
CPUs without matrix instructions for it. So tiles are copied to contiguous float32, in time linear in their length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...distributed.buffers import new_buffer
from ...planning.tiles import Segments
from ..scores import Scores
from .base import Block, Kernel, blocks, is_plain
from .reference import ReferenceKernel

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

MOST_QUERIES = 256
"""Queries of a window that are computed at a time, with the keys that any of them reads. With more queries, more
hidden pairs are computed; with fewer, keys are read more often."""


class CpuKernel(Kernel):
    name = "cpu"

    @staticmethod
    def missing() -> str | None:
        return None

    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, but the tensors are on {device}. Use kernel='auto'"
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float64, float32, bfloat16 and float16, not {dtype}. Use one of these dtypes"
        return None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if scores.softcap is not None or scores.dropout_p:  # the operators support neither
            return ReferenceKernel().forward(query, key, value, segments, scores)
        value_dim = value.shape[-1]
        query, key, value = _one_head_dim(query, key, value)
        outputs, lses = [], []
        for (q0, q1), (k0, k1) in zip(segments.queries, segments.keys):
            rows, keys, values = (_heads_first(x) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            for block, options in _calls(q1 - q0, k1 - k0, segments, rows.dtype):
                output, lse = _forward(
                    _part(rows, block.query),
                    _part(keys, block.key),
                    _part(values, block.key),
                    0.0,
                    scale=scores.scale,
                    **options,
                )
                outputs.append(_tokens_first(output)[..., :value_dim])
                lses.append(lse[0].T)
        return _cat(outputs), _cat(lses)

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
        if scores.softcap is not None or scores.dropout_p:
            return ReferenceKernel().backward(grad_output, query, key, value, output, lse, segments, scores)
        query_dim, value_dim = query.shape[-1], value.shape[-1]
        query, key, value, grad_output, output = _one_head_dim(query, key, value, grad_output, output)
        grads: tuple[list[torch.Tensor], ...] = [], [], []
        for (q0, q1), (k0, k1) in zip(segments.queries, segments.keys):
            grad_rows, rows, outputs = (_heads_first(x[q0:q1]) for x in (grad_output, query, output))
            keys, values = _heads_first(key[k0:k1]), _heads_first(value[k0:k1])
            of_keys: list[torch.Tensor] | None = None
            for block, options in _calls(q1 - q0, k1 - k0, segments, rows.dtype):
                grad_query, *grad_key_value = _backward(
                    _part(grad_rows, block.query),
                    _part(rows, block.query),
                    _part(keys, block.key),
                    _part(values, block.key),
                    _part(outputs, block.query),
                    lse[q0 + block.query[0] : q0 + block.query[1]].T[None],
                    0.0,
                    scale=scores.scale,
                    **options,
                )
                grads[0].append(_tokens_first(grad_query))
                if block.key == (0, k1 - k0) and of_keys is None:
                    of_keys = grad_key_value
                    continue
                of_keys = of_keys or [torch.zeros_like(keys), torch.zeros_like(values)]
                for total, part in zip(of_keys, grad_key_value):
                    _part(total, block.key).add_(part)
            for parts, part in zip(grads[1:], of_keys or ()):
                parts.append(_tokens_first(part))
        grad_query, grad_key, grad_value = (_cat(parts) for parts in grads)
        return grad_query[..., :query_dim], grad_key[..., :query_dim], grad_value[..., :value_dim]


def _calls(queries: int, keys: int, segments: Segments, dtype: torch.dtype) -> Iterator[tuple[Block, dict[str, Any]]]:
    """Yield the calls of the operators for a tile: blocks, each with the arguments for its mask.

    A tile that is read entirely, or a square causal tile, takes one call. Any other tile takes a call for each block,
    with a mask tensor.
    """
    if is_plain(queries, keys, segments.band):
        yield Block((0, queries), (0, keys), None, None), {"is_causal": segments.band.right == 0}
        return
    for block in blocks(queries, keys, segments.band, MOST_QUERIES):
        hidden = block.hidden(torch.device("cpu"))
        mask = None if hidden is None else torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        yield block, {"is_causal": False, "attn_mask": mask}


def _part(tensor: torch.Tensor, interval: tuple[int, int]) -> torch.Tensor:
    """Cut `[1, H, S, D]` to a range of its tokens."""
    return tensor if interval == (0, tensor.shape[2]) else tensor[:, :, slice(*interval)]


def _one_head_dim(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Pad tensors with zeros to one head dim, which the operators need. Scores and outputs do not change."""
    largest = max(tensor.shape[-1] for tensor in tensors)
    return [
        tensor if tensor.shape[-1] == largest else torch.nn.functional.pad(tensor, (0, largest - tensor.shape[-1]))
        for tensor in tensors
    ]


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """Copy `[S, H, D]` to contiguous `[1, H, S, D]`, in float32 or a wider dtype."""
    view = tensor.transpose(0, 1)[None]
    return new_buffer(view, *view.shape, dtype=torch.promote_types(view.dtype, torch.float32)).copy_(view)


def _tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    """View `[1, H, S, D]` as `[S, H, D]`."""
    return tensor[0].transpose(0, 1)


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
