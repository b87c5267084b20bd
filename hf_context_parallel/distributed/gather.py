"""Gather of the outputs of shards on every rank, in the order of the sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ..planning.layout import Layout
from .host import beside
from .messages import accumulation_dtype


def gather_sequence(x: torch.Tensor, layout: Layout, length: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Gather `[B, S_local, ...]` of each rank to `[B, length, ...]`, without the padding of the layout.

    Args:
        layout: a layout in which all ranks hold equally many tokens.
        length: number of positions to return, from the first on.
    """
    gathered: torch.Tensor = _Gather.apply(x, layout, length, group)
    return gathered


def sum_over_ranks(x: torch.Tensor, size: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum a tensor over the ranks of a group of this size.

    The objective is the sum of the losses of all ranks, which all depend on the sum alike. So backward counts the
    gradient once for each rank.
    """
    total: torch.Tensor = _Sum.apply(x, size, group)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: int, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.size = size
        total = x.clone()
        if size > 1:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.size, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layout: Layout, length: int, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        ctx.layout, ctx.group = layout, group
        parts = [x.contiguous()]
        if layout.size > 1:
            parts = [torch.empty_like(parts[0]) for _ in range(layout.size)]
            dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=1).index_select(1, beside(layout.restore()[:length], x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        layout = ctx.layout
        whole = pad(grad, (0, 0) * (grad.dim() - 2) + (0, layout.length - grad.shape[1]))
        # Gradients are summed over ranks, so they travel in the accumulation dtype.
        whole = whole.to(accumulation_dtype(grad.dtype))
        everyone = (beside(layout.positions(rank), grad) for rank in range(layout.size))
        parts = [whole.index_select(1, positions) for positions in everyone]
        local = parts[0]
        if layout.size > 1:
            local = torch.empty_like(local)
            dist.reduce_scatter(local, parts, group=ctx.group)
        return local.to(grad.dtype), None, None, None
