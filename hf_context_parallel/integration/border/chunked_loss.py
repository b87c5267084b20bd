"""Sum of the losses of tokens whose logits are made for some tokens at a time, in forward and backward.

The gradients are computed in forward, chunk by chunk, and kept until backward scales them. So each logit is made once,
as without chunks, and no more than those of one chunk are held. This is the way of Liger Kernel (Hsu et al., "Liger
Kernel: Efficient Triton Kernels for LLM Training", 2024, arXiv:2410.10989), for any loss of tokens and any output
embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ...distributed.messages import accumulation_dtype

LOGITS = 2**25
"""Number of logits that are made at a time: 128 MiB in float32."""
BLOCK = 4096
"""Number of rows that are scaled at a time."""
LEAST = 16
"""Fewest tokens of a chunk, whatever the vocabulary."""


def chunked_sum(
    hidden: torch.Tensor,
    loss: Callable[[torch.Tensor, slice], torch.Tensor],
    vocabulary: int,
    parameters: Sequence[torch.Tensor],
    chunk: int | None = None,
) -> torch.Tensor:
    """Sum a loss over tokens, chunk by chunk. Its gradients are summed in float32 or wider.

    Args:
        hidden: `[T, D]`, the input of the output embeddings for each token.
        loss: function of the rows of `hidden` in a range, and of this range, that returns the sum of their losses.
        vocabulary: number of logits of a token.
        parameters: all tensors that `loss` uses and that need gradients.
        chunk: number of tokens of a chunk; None for as many as have `LOGITS` logits.
    """
    chunk = chunk or max(LEAST, LOGITS // vocabulary)
    total: torch.Tensor = _ChunkedSum.apply(hidden, loss, chunk, torch.is_grad_enabled(), *parameters)
    return total


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, loss: Callable, chunk: int, grad: bool, *parameters: torch.Tensor
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[:1] + ctx.needs_input_grad[4:]
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        pieces, total = [], None
        for start in range(0, max(1, len(hidden)), chunk):
            tokens = slice(start, start + chunk)
            # Gradients are computed at once, so hooks that move saved tensors to the host would only fetch them again.
            with torch.set_grad_enabled(grad and any(wanted)), saved_tensors_hooks(_kept, _kept):
                piece = hidden[tokens].detach().requires_grad_(wanted[0])
                part = loss(piece, tokens)
            wide = part.detach().to(accumulation_dtype(part.dtype))
            total = wide if total is None else total + wide
            if not part.requires_grad:
                continue
            inputs = [x for x, needed in zip((piece, *parameters), wanted) if needed]
            found = iter(torch.autograd.grad(part, inputs, allow_unused=True))
            grads = [next(found) if needed else None for needed in wanted]
            if wanted[0]:
                pieces.append(grads[0])
            for number, (parameter, one) in enumerate(zip(parameters, grads[1:])):
                if one is not None:
                    one = one.to(accumulation_dtype(parameter.dtype))
                    before = sums[number]
                    sums[number] = one if before is None else before.add_(one)
        kept = [x if x is None else x.to(p.dtype) for x, p in zip(sums, parameters)]
        ctx.is_empty = not len(hidden)
        ctx.save_for_backward(torch.cat(pieces) if pieces else None, *kept)
        return total.to(part.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.is_empty:  # a mean over no target has an infinite factor, and its gradient is 0 in PyTorch
            grad = torch.zeros_like(grad)
        hidden, *parameters = (None if x is None else _scaled(x, grad) for x in ctx.saved_tensors)
        return hidden, None, None, None, *parameters


def _kept(x: torch.Tensor) -> torch.Tensor:
    """Return what autograd saves, without a graph: an output with its own graph would hold itself."""
    return x.detach()


def _scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply a tensor by a scalar. The scalar is not rounded to the dtype of the tensor."""
    if torch.promote_types(x.dtype, factor.dtype) == x.dtype:
        return x * factor
    result = torch.empty_like(x)
    for piece, scaled in zip(x.split(BLOCK), result.split(BLOCK)):  # no whole tensor of the wide dtype is made
        scaled.copy_(piece.to(factor.dtype) * factor)
    return result
