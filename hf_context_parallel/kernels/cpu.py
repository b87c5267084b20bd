"""PyTorch's flash attention on the CPU, called by its operators since they give the LSE.

The operators are fast for contiguous `[1, H, S, D]` in float32: bfloat16 costs them ten times as much in backward on
CPUs without matrix instructions for it. So tiles are copied into that form, which is linear in their length.
"""

from __future__ import annotations

import torch

from .base import Kernel

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuKernel(Kernel):
    name = "cpu"

    @staticmethod
    def missing() -> str | None:
        return None

    def refusal(self, device, dtype, query_dim, value_dim) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU and the tensors are on {device}; use kernel='auto'"
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float64, float32, bfloat16 and float16, not {dtype}"
        return None

    def forward(self, query, key, value, segments, scale):
        value_dim = value.shape[-1]
        query, key, value = _one_head_dim(query, key, value)
        outputs, lses = [], []
        for (q0, q1), (k0, k1) in zip(segments.queries, segments.keys):
            output, lse = _forward(
                _heads_first(query[q0:q1]),
                _heads_first(key[k0:k1]),
                _heads_first(value[k0:k1]),
                0.0,
                segments.causal,
                scale=scale,
            )
            outputs.append(_tokens_first(output)[..., :value_dim])
            lses.append(lse[0].T)
        return _cat(outputs), _cat(lses)

    def backward(self, grad_output, query, key, value, output, lse, segments, scale):
        query_dim, value_dim = query.shape[-1], value.shape[-1]
        query, key, value, grad_output, output = _one_head_dim(query, key, value, grad_output, output)
        grads = []
        for (q0, q1), (k0, k1) in zip(segments.queries, segments.keys):
            parts = _backward(
                _heads_first(grad_output[q0:q1]),
                _heads_first(query[q0:q1]),
                _heads_first(key[k0:k1]),
                _heads_first(value[k0:k1]),
                _heads_first(output[q0:q1]),
                lse[q0:q1].T[None],
                0.0,
                segments.causal,
                scale=scale,
            )
            grads.append([_tokens_first(part) for part in parts])
        grad_query, grad_key, grad_value = (_cat(parts) for parts in zip(*grads))
        return grad_query[..., :query_dim], grad_key[..., :query_dim], grad_value[..., :value_dim]


def _one_head_dim(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors padded with zeros to one head dim, which the operators want. Scores and outputs stay as they are."""
    largest = max(tensor.shape[-1] for tensor in tensors)
    return [
        tensor if tensor.shape[-1] == largest else torch.nn.functional.pad(tensor, (0, largest - tensor.shape[-1]))
        for tensor in tensors
    ]


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """`[S, H, D]` as contiguous `[1, H, S, D]`, in float32 at least."""
    view = tensor.transpose(0, 1)[None]
    return view.new_empty(view.shape, dtype=torch.promote_types(view.dtype, torch.float32)).copy_(view)


def _tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    """`[1, H, S, D]` as `[S, H, D]`."""
    return tensor[0].transpose(0, 1)


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
