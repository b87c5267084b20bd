"""Tests of the executor's guard and of autocast, on simulated groups."""

import pytest
import torch

from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.planning.layout import zigzag
from tests.helpers.ring import MASKS, PLAIN, on_rank, share, tensors
from tests.helpers.simulated import Log, run


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


def test_the_guard_stops_a_backward_before_it_sends():
    mask = MASKS["one document"]
    layout, whole, logs = zigzag(mask.length, 2), tensors(mask), [Log(), Log()]

    def guard():
        raise RuntimeError("this batch is gone")

    def guarded(exchange):
        leaves = [share(layout, exchange.rank, x).requires_grad_() for x in whole]
        output = attention(
            *leaves[:3],
            strategy=build_strategy("p2p", 1, layout, mask, exchange.rank),
            exchange=logs[exchange.rank].exchange(exchange),
            kernel=choose_kernel("cpu", "cpu"),
            scores=PLAIN,
            guard=guard,
        )
        forward = list(logs[exchange.rank].events)
        with pytest.raises(RuntimeError, match="this batch is gone"):
            output.sum().backward()
        return forward

    assert run(2, guarded) == [log.events for log in logs]
