"""Differentiable gather of the rows that ranks hold, in the order of the items that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ...distributed.host import beside
from ...distributed.mesh import Ranks
from ...distributed.messages import accumulation_dtype


class Placement:
    """Places of the rows of all ranks in the order of the items.

    Args:
        shares: the items of each rank, in the order of its rows.
        rows: number of rows of each item.
        ranks: the ranks.
    """

    def __init__(self, shares: Sequence[Sequence[int]], rows: Sequence[int], ranks: Ranks):
        self.ranks = ranks
        counts = [sum(rows[item] for item in share) for share in shares]
        self.mine = counts[ranks.rank]
        self.most = max(counts)
        begins = {}
        for rank, share in enumerate(shares):
            begin = rank * self.most
            for item in share:
                begins[item] = begin
                begin += rows[item]
        places = [torch.arange(begins[item], begins[item] + rows[item]) for item in range(len(rows))]
        self.places = torch.cat(places)
        """`[rows of all items]`: the place of each row among the rows of all ranks, each padded to `most`."""

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the first `mine` rows of each rank."""
        kind = x.dtype
        mine = x.new_zeros(self.most, *x.shape[1:], dtype=torch.uint8 if kind == torch.bool else kind)
        mine[: self.mine] = x[: self.mine]
        parts = [torch.empty_like(mine) for _ in range(self.ranks.size)]
        dist.all_gather(parts, mine, group=self.ranks.group)
        return torch.cat(parts).index_select(0, beside(self.places, x)).to(kind)

    def summed(self, grad: torch.Tensor, rows: int) -> torch.Tensor:
        """Sum over the ranks the gradients of what was gathered, and return those of `rows` rows of this rank."""
        wide = grad.to(accumulation_dtype(grad.dtype))
        whole = wide.new_zeros(self.most * self.ranks.size, *grad.shape[1:])
        whole[beside(self.places, grad)] = wide
        local = torch.empty_like(whole[: self.most])
        dist.reduce_scatter(local, list(whole.split(self.most)), group=self.ranks.group)
        result = grad.new_zeros(rows, *grad.shape[1:])
        result[: self.mine] = local[: self.mine]
        return result


def gather_rows(tensors: Sequence[torch.Tensor], placements: Sequence[Placement]) -> tuple[torch.Tensor, ...]:
    """Gather each tensor `[rows, ...]` on all ranks.

    Rows that belong to no item of a rank, after its others, get a gradient of zero. All are gathered by one node of
    the graph, so that ranks sum their gradients in the same order.
    """
    gathered: tuple[torch.Tensor, ...] = _Gather.apply(placements, *tensors)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, placements: Sequence[Placement], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.placements, ctx.rows = placements, [len(x) for x in tensors]
        results = tuple(placement.gathered(x) for placement, x in zip(placements, tensors))
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(result for result, wanted in zip(results, needed) if not wanted))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        parts = zip(ctx.placements, grads, ctx.rows, needed)
        return None, *(x.summed(grad, rows) if wanted else None for x, grad, rows, wanted in parts)
