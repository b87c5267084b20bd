"""Tests of memory that is kept to be used again."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.distributed.buffers import (
    EXCESS,
    PATIENCE,
    SMALL,
    BufferPool,
    IdleBlocks,
    capacity_for,
    is_kept,
    keeping,
    new_buffer,
)

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


SHAPE = 200, 3, 64


def views(x: torch.Tensor) -> list[torch.Tensor]:
    return [x, x[7:9], x.detach().flatten(), x.view(torch.uint8), x[0, 0, :1], x.as_strided((2,), (3,)), x.mT]


@pytest.mark.parametrize("which", range(7))
def test_memory_serves_another_buffer_when_no_view_has_it(which):
    pool = BufferPool()
    buffer = pool.empty(SHAPE, torch.float32)
    address, view = buffer.data_ptr(), views(buffer)[which]
    del buffer
    other = pool.empty(SHAPE, torch.float32)
    assert other.data_ptr() != address and view.numel()
    del view
    assert pool.empty(SHAPE, torch.float32).data_ptr() == address


def test_memory_that_autograd_saved_is_in_use():
    pool, weight = BufferPool(), torch.ones(64, requires_grad=True)
    buffer = pool.empty(SHAPE, torch.float32).fill_(3.0)
    product = (buffer * weight).sum()
    del buffer
    others = [pool.empty(SHAPE, torch.float32).zero_() for _ in range(3)]
    product.backward()
    assert (weight.grad == 3.0 * 200 * 3).all() and len(others) == 3
    del product
    addresses = {x.data_ptr() for x in others}
    assert pool.empty(SHAPE, torch.float32).data_ptr() not in addresses


def test_numbers_of_buffers_that_threads_use_are_their_own():
    """Check buffers of many sizes that live for a random time in threads, and are freed by other threads too."""
    pool, wrong, shared = BufferPool(), [], []

    def work(thread: int) -> None:
        held, generator = [], torch.Generator().manual_seed(thread)
        for number in range(400):
            size, slot = torch.randint(1, 3000, (2,), generator=generator).tolist()
            dtype = (torch.bfloat16, torch.float64)[size % 2]
            label = (thread * 400 + number) % 251
            held.append((label, pool.empty((size, 2), dtype).fill_(label)[: size // 2 + 1]))
            label, buffer = held.pop(slot % len(held)) if len(held) > 5 else held[-1]
            if not (buffer == label).all():
                wrong.append((thread, number))
            shared.append(buffer)
            if len(shared) > 8:
                shared.pop(0)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    shared.clear()
    assert len(pool._returned) + len(pool._idle._blocks) <= 4 * 7 + 9 + PATIENCE


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_buffers_are_tensors_of_their_mode(mode):
    """Check that memory which evaluation used serves training."""
    pool = BufferPool()
    with mode():
        buffer = pool.empty(SHAPE, torch.bfloat16)
        assert buffer.is_inference() == torch.is_inference_mode_enabled()
    address = buffer.data_ptr()
    del buffer
    buffer = pool.empty(SHAPE, torch.bfloat16)
    assert buffer.data_ptr() == address and not buffer.is_inference() and not buffer._is_view()
    assert buffer.is_contiguous() and buffer.shape == SHAPE and buffer.dtype == torch.bfloat16
    (torch.ones(64, dtype=torch.bfloat16, requires_grad=True) * buffer).sum().backward()


def test_memory_that_is_not_kept_is_that_of_the_allocator():
    like, others = torch.empty(0), []

    def is_of_the_pool() -> bool:
        return not new_buffer(like, SMALL).untyped_storage().resizable()

    with keeping(False):
        assert not is_of_the_pool() and not is_kept()
        thread = threading.Thread(target=lambda: others.append(is_of_the_pool()))  # such as one of autograd
        thread.start()
        thread.join()
        with keeping(True):
            assert is_of_the_pool()
        assert not is_of_the_pool()
    assert is_of_the_pool() and is_kept() and others == [True]


def test_small_buffers_and_those_of_devices_are_left_to_their_allocators():
    small, meta = new_buffer(torch.empty(0), 7), new_buffer(torch.empty(0, device="meta"), SMALL, dtype=torch.int64)
    assert small.shape == (7,) and small.untyped_storage().resizable()  # memory of another owner is not
    assert meta.device.type == "meta" and meta.dtype == torch.int64
    assert not new_buffer(torch.empty(0), SMALL).untyped_storage().resizable()
