"""Tests of the executor's guard and of autocast, on simulated groups."""

import torch

from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.planning.layout import zigzag
from tests.helpers.ring import MASKS, on_rank, tensors
from tests.helpers.simulated import run


def test_autocast_changes_nothing():
    mask = MASKS["one document"]
    layout, whole = zigzag(mask.length, 2), tensors(mask, dtype=torch.float32)
    kernel = choose_kernel("reference", "cpu")

    def under_autocast(exchange):
        with torch.autocast("cpu", torch.bfloat16):
            return on_rank(exchange, layout, mask, whole, kernel)

    plain = run(2, lambda exchange: on_rank(exchange, layout, mask, whole, kernel))
    for expected, got in zip(plain, run(2, under_autocast)):
        assert all(x.dtype == torch.float32 and x.equal(y) for x, y in zip(got, expected))
