"""Tests of `cp.gather` on real process groups."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.models import context, error, labelled


# Gather
def gather_errors(dtype: torch.dtype) -> tuple[float, float]:
    """Gather outputs in order, and compute the gradient of a loss of them. Every rank divides its loss by N."""
    cp, batch = context(), labelled(2, 11)
    weight = torch.randn(2, 11, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = torch.randn(2, 11, 3, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    (whole * weight).sin().sum().backward()
    with cp.shard(batch) as local:
        columns = local["position_ids"]
        mine = whole.detach()[torch.arange(2)[:, None], columns].requires_grad_()
        gathered = cp.gather(mine)
        ((gathered * weight).sin().sum() / cp.size).backward()
        with pytest.raises(ValueError, match="begins with"):
            cp.gather(gathered)
        ids = cp.gather(local["input_ids"])
    assert torch.equal(ids, batch["input_ids"])
    expected = whole.grad[torch.arange(2)[:, None], columns]
    real = cp.positions(12) < 11
    assert (mine.grad[:, ~real] == 0).all()
    return error(gathered, whole), error(mine.grad[:, real], expected[:, real])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-2)])
def test_gather_restores_the_order_and_sums_gradients(on_ranks, dtype, bound):
    for forward, backward in on_ranks(3, gather_errors, dtype):
        assert forward == 0 and backward < bound


def test_gather_outside_of_shard_says_where_it_belongs():
    with pytest.raises(RuntimeError, match=r"inside `with cp.shard"):
        context().gather(torch.zeros(1, 2))
