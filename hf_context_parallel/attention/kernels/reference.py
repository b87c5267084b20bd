"""Kernel `reference`: attention in plain PyTorch, for any dtype and device.

It stores the scores of one block of queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...planning.tiles import Segments
from ..scores import Scores
from .base import Block, Kernel, blocks

MOST_SCORES = 2**22
"""Most scores that are stored at a time, all heads counted. At least one query is computed, whatever its scores."""


class ReferenceKernel(Kernel):
    name = "reference"

    @staticmethod
    def missing() -> str | None:
        return None

    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        return None if dtype.is_floating_point else f"it takes no {dtype}. Use a floating-point dtype"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, lses = [], []
        for number, rows, keys, values in _tiles(segments, query, key, value):
            for block in _blocks(rows, keys, segments):
                part = _Block(block, rows, keys, scores, (number, block.query))
                lse = part.scores.logsumexp(-1, keepdim=True)
                weights = part.dropped((part.scores - lse).exp())
                output = torch.einsum("ghqk,khd->qhgd", weights, _exact(values[slice(*block.key)]))
                outputs.append(output.flatten(1, 2).to(query.dtype))
                lses.append(lse.permute(2, 1, 0, 3).flatten(1))
        return torch.cat(outputs), torch.cat(lses)

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
        grads: tuple[list[torch.Tensor], ...] = [], [], []
        for number, rows, keys, values, grad_rows, outputs, lses in _tiles(
            segments, query, key, value, grad_output, output, lse
        ):
            heads = keys.shape[1]
            grad_key, grad_value = (torch.zeros_like(_exact(x)) for x in (keys, values))
            for block in _blocks(rows, keys, segments):
                part = _Block(block, rows, keys, scores, (number, block.query))
                seen, chosen = slice(*block.key), slice(*block.query)
                grad = _grouped(grad_rows[chosen], heads)
                weights = (part.scores - _grouped(lses[chosen, :, None], heads)).exp()
                delta = (grad * _grouped(outputs[chosen], heads)).sum(-1, keepdim=True)
                grad_weights = part.dropped(torch.einsum("ghqd,khd->ghqk", grad, _exact(values[seen])))
                grad_scores = weights * (grad_weights - delta) * part.slope * scores.scale
                grads[0].append(torch.einsum("ghqk,khd->qhgd", grad_scores, part.keys).flatten(1, 2))
                grad_key[seen] += torch.einsum("ghqk,ghqd->khd", grad_scores, part.queries)
                grad_value[seen] += torch.einsum("ghqk,ghqd->khd", part.dropped(weights), grad)
            grads[1].append(grad_key)
            grads[2].append(grad_value)
        grad_query, grad_keys, grad_values = (torch.cat(parts) for parts in grads)
        return grad_query, grad_keys, grad_values


class _Block:
    """Scores of one block `[H / H_kv, H_kv, Q, K]`, -inf at hidden pairs.

    `slope` is the derivative of the softcap at each score.
    """

    def __init__(self, block: Block, rows: torch.Tensor, keys: torch.Tensor, scores: Scores, name: tuple[object, ...]):
        self.keys = _exact(keys[slice(*block.key)])
        self.queries = _grouped(rows[slice(*block.query)], keys.shape[1])
        self.scores = torch.einsum("ghqd,khd->ghqk", self.queries, self.keys) * scores.scale
        self.slope: torch.Tensor | float = 1.0
        if scores.softcap is not None:
            capped = (self.scores / scores.softcap).tanh()
            self.scores, self.slope = capped * scores.softcap, 1 - capped**2
        hidden = block.hidden(rows.device)
        if hidden is not None:
            self.scores = self.scores.masked_fill(hidden, float("-inf"))
        self._kept = _kept(self.scores, scores, name) if scores.dropout_p else None

    def dropped(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights after dropout."""
        return weights if self._kept is None else weights * self._kept


def _kept(like: torch.Tensor, scores: Scores, name: tuple[object, ...]) -> torch.Tensor:
    """Dropout factor of each weight: 0 or 1 / (1 - p). The same seed and block give the same factors."""
    random = torch.Generator(like.device).manual_seed(scores.of(*name).seed)
    keeps = torch.rand(like.shape, generator=random, device=like.device) >= scores.dropout_p
    return keeps.to(like.dtype) / (1 - scores.dropout_p)


def _tiles(
    segments: Segments, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rows: torch.Tensor
) -> Iterator[tuple[Any, ...]]:
    """Yield the number of each tile and its part of each tensor. Tensors in `rows` are cut by the query range."""
    for number, ((q0, q1), (k0, k1)) in enumerate(zip(segments.queries, segments.keys)):
        yield number, query[q0:q1], key[k0:k1], value[k0:k1], *(x[q0:q1] for x in rows)


def _blocks(rows: torch.Tensor, keys: torch.Tensor, segments: Segments) -> Iterator[Block]:
    most = max(1, MOST_SCORES // (rows.shape[1] * len(keys)))
    return blocks(len(rows), len(keys), segments.band, most)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to float32 or a wider dtype, in which sums are computed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _grouped(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Turn `[Q, H, D]` into `[H / H_kv, H_kv, Q, D]`, in which query head h reads key head h // (H / H_kv)."""
    grouped: torch.Tensor = _exact(tensor).unflatten(1, (key_heads, -1)).permute(2, 1, 0, 3)
    return grouped
