"""Tests of memory that is kept to be used again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.distributed.buffers import EXCESS, PATIENCE, IdleBlocks, capacity_for

SIZES = st.integers(0, 100_000)


@given(SIZES, st.lists(SIZES))
def test_the_smallest_block_that_fits_is_taken(size, others):
    blocks: IdleBlocks[int] = IdleBlocks()
    for capacity in others:
        blocks.put(capacity, capacity)
    fitting = [capacity for capacity in others if size <= capacity <= EXCESS * capacity_for(size)]
    assert blocks.take(size) == min(fitting, default=None)
    assert [blocks.take(size) for _ in others] == [*sorted(fitting)[1:], *[None] * (len(others) - len(fitting[1:]))]


def test_a_block_that_serves_no_request_is_released():
    blocks: IdleBlocks[str] = IdleBlocks()
    blocks.put(2**20, "large")
    for _ in range(PATIENCE):
        small = blocks.take(100)
        blocks.put(4096, "small")
        assert not blocks.release() and small in ("small", None)
    blocks.take(100)
    assert blocks.release() == ["large"]
    assert blocks.take(2**20) is None
