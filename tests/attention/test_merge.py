"""Tests of the error that a ring of eight adds to that of one kernel call."""

import pytest
import torch

from hf_context_parallel.attention import merge
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows
from tests.helpers.ring import KERNELS, dense, ring, tensors
from tests.helpers.simulated import SimulatedExchange


def errors(size, mask, whole, kernel):
    """Root mean square error of the output and of each gradient, relative to its root mean square."""
    pairs = zip(ring(zigzag(mask.length, size), mask, whole, kernel), dense(mask, *whole))
    return torch.stack([(got.double() - truth).norm() / truth.norm() for got, truth in pairs])


def sum_in(dtype, monkeypatch):
    """Make the ring keep its sums in `dtype`: round them after each addition, and when they travel."""

    def rounding(combine):
        def combine_and_round(source, part, target, *args):
            combine(source, part, target, *args)
            target.copy_(target.to(dtype))

        return combine_and_round

    def post(exchange, sends, receives, post=SimulatedExchange.post):
        for _, tensor in sends:
            tensor.copy_(tensor.to(dtype))
        return post(exchange, sends, receives)

    monkeypatch.setattr(merge, "merge_rows", rounding(merge.merge_rows))
    monkeypatch.setattr(merge, "add_rows", rounding(merge.add_rows))
    monkeypatch.setattr(SimulatedExchange, "post", post)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_does_not_grow_with_the_ring(dtype, kernel, monkeypatch):
    mask = Mask(256, whole_rows(1, 256), Pattern(causal=False))
    whole = tensors(mask, dtype=dtype)
    alone, two, eight = (errors(size, mask, whole, kernel) for size in (1, 2, 8))
    sum_in(dtype, monkeypatch)
    naive = errors(8, mask, whole, kernel)
    assert (eight <= 1.2 * two).all() and (two <= 1.5 * alone).all()
    assert (1.25 * eight < naive).all()
