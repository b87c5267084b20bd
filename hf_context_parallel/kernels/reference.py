"""Attention in plain PyTorch, for any dtype and device. It keeps a matrix of scores for each tile."""

from __future__ import annotations

import torch

from .base import Kernel


class ReferenceKernel(Kernel):
    name = "reference"

    @staticmethod
    def missing() -> str | None:
        return None

    def refusal(self, device, dtype, query_dim, value_dim) -> str | None:
        return None if dtype.is_floating_point else f"dtype {dtype} is not a floating-point dtype"

    def forward(self, query, key, value, segments, scale):
        outputs, lses = [], []
        for (q0, q1), (k0, k1) in zip(segments.queries, segments.keys):
            scores = _scores(query[q0:q1], key[k0:k1], segments.causal, scale)
            lse = scores.logsumexp(-1, keepdim=True)
            output = torch.einsum("ghqk,khd->qhgd", (scores - lse).exp(), _exact(value[k0:k1]))
            outputs.append(output.flatten(1, 2).to(query.dtype))
            lses.append(lse.permute(2, 1, 0, 3).flatten(1))
        return torch.cat(outputs), torch.cat(lses)

    def backward(self, grad_output, query, key, value, output, lse, segments, scale):
        grads = []
        for (q0, q1), (k0, k1) in zip(segments.queries, segments.keys):
            rows, keys, values = query[q0:q1], _exact(key[k0:k1]), _exact(value[k0:k1])
            heads = keys.shape[1]
            grad = _grouped(grad_output[q0:q1], heads)
            weights = (_scores(rows, keys, segments.causal, scale) - _grouped(lse[q0:q1, :, None], heads)).exp()
            delta = (grad * _grouped(output[q0:q1], heads)).sum(-1, keepdim=True)
            grad_scores = weights * (torch.einsum("ghqd,khd->ghqk", grad, values) - delta) * scale
            grad_query = torch.einsum("ghqk,khd->qhgd", grad_scores, keys).flatten(1, 2)
            grad_key = torch.einsum("ghqk,ghqd->khd", grad_scores, _grouped(rows, heads))
            grads.append((grad_query, grad_key, torch.einsum("ghqk,ghqd->khd", weights, grad)))
        return tuple(torch.cat(parts) for parts in zip(*grads))


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the precision that sums are kept in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _grouped(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """`[Q, H, D]` as `[H / H_kv, H_kv, Q, D]`: query head h reads key head h // (H / H_kv)."""
    return _exact(tensor).unflatten(1, (key_heads, -1)).permute(2, 1, 0, 3)


def _scores(query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """`[H / H_kv, H_kv, Q, K]`, -inf where masked."""
    scores = torch.einsum("ghqd,khd->ghqk", _grouped(query, key.shape[1]), _exact(key)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores
