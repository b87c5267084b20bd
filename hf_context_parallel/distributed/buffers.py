"""Memory that is kept to be used again, for buffers on the CPU and for messages between processes.

The C library returns large blocks to the system when they are freed. When it gets them anew, in the next layer, each
4 KiB cost a page fault. It keeps them if `mallopt` or the environment sets other thresholds (M_TRIM_THRESHOLD and
M_MMAP_THRESHOLD of glibc, see mallopt(3)). But `mallopt` would change the memory of the whole process, and a user
would have to set the environment before the process starts. So buffers of messages are kept here, and nothing has to
be set. On CUDA they come from the allocator of PyTorch, which keeps memory itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Generic, TypeVar
from weakref import finalize

import torch

Block = TypeVar("Block")

PATIENCE = 64
"""Number of requests that an idle block waits for one that it serves. Then it is released."""
EXCESS = 8
"""Largest ratio of the bytes of a block to the power of two that is asked for."""
PAGE = 4096
SMALL = 1 << 17
"""Bytes below which buffers are left to the C library. It keeps such blocks itself (`M_MMAP_THRESHOLD` of glibc)."""


def capacity_for(size: int) -> int:
    """Bytes of a new block for a request of `size` bytes: a power of two, so that it serves similar requests.

    The system gives memory only to pages that have been written, so the rest of the block costs nothing.
    """
    return max(PAGE, 1 << (size - 1).bit_length())


class IdleBlocks(Generic[Block]):
    """Blocks of memory that nobody uses. One that serves none of `PATIENCE` requests is released."""

    def __init__(self) -> None:
        self._blocks: list[tuple[int, int, Block]] = []
        """Bytes of each block, the number of requests when it became idle, and the block."""
        self._requests = 0

    def put(self, capacity: int, block: Block) -> None:
        self._blocks.append((capacity, self._requests, block))

    def take(self, size: int) -> Block | None:
        """Take the smallest block that holds `size` bytes. It is None if there is none, or if all are far larger."""
        self._requests += 1
        fitting = [
            (capacity, index)
            for index, (capacity, _, _) in enumerate(self._blocks)
            if size <= capacity <= EXCESS * capacity_for(size)
        ]
        return self._blocks.pop(min(fitting)[1])[2] if fitting else None

    def release(self) -> list[Block]:
        """Forget the blocks that have waited too long, and return them."""
        oldest = self._requests - PATIENCE
        released = [block for _, since, block in self._blocks if since < oldest]
        self._blocks = [entry for entry in self._blocks if entry[1] >= oldest]
        return released


class BufferPool:
    """Memory of buffers on the CPU, which serves another buffer when no tensor has it any more.

    What it keeps idle has served one of the last `PATIENCE` buffers of the process. These are the buffers of one layer
    or of few layers, whose memory was in use at a time.
    """

    def __init__(self) -> None:
        self._idle: IdleBlocks[torch.Tensor] = IdleBlocks()
        self._returned: deque[torch.Tensor] = deque()
        """Memory that was given back. Any thread may do that at any moment, even one that holds the lock."""
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor with unspecified values, whose memory is given back when no tensor has it any more."""
        size = prod(shape) * dtype.itemsize
        with self._lock:
            while self._returned:
                memory = self._returned.popleft()
                self._idle.put(len(memory), memory)
            found = self._idle.take(size)
            self._idle.release()
        memory = torch.empty(capacity_for(size), dtype=torch.uint8) if found is None else found
        return lying_in(lease(memory, 0, size, partial(self._returned.append, memory)), shape, dtype)


def lease(memory: torch.Tensor, start: int, size: int, ended: Callable[[], object]) -> torch.UntypedStorage:
    """Make a storage of a part of some bytes, which calls `ended` when nothing has it any more, in any thread.

    It has the memory of an array that lives as long as anything has it: a tensor, its views, or what autograd saved.
    The finalizer of this array makes the call.
    """
    part = memory.numpy()[start : start + size]
    finalize(part, ended).atexit = False
    return torch.from_numpy(part).untyped_storage()


def lying_in(storage: torch.UntypedStorage, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Make a contiguous tensor of a whole storage. It is no view, as a tensor that is reshaped would be."""
    return torch.empty(0, dtype=dtype).set_(storage).resize_(shape)


_pool = BufferPool()


class _Keeping(threading.local):
    """State of a thread: `on` while memory of the buffers that it makes is kept."""

    on = True


_keeping = _Keeping()


def is_kept() -> bool:
    """Return True if memory of buffers that this thread makes now is kept for others."""
    return _keeping.on


@contextmanager
def keeping(on: bool) -> Iterator[None]:
    """Keep the memory of buffers that this thread makes in a block, or give it back to the system with each buffer."""
    before, _keeping.on = _keeping.on, on
    try:
        yield
    finally:
        _keeping.on = before


def new_buffer(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Make a tensor with unspecified values on the device of `like`, that is used for a short time in every layer.

    It is used as any other tensor.

    Args:
        dtype: its dtype; that of `like` unless given.
    """
    dtype = like.dtype if dtype is None else dtype
    if like.is_cpu and _keeping.on and prod(shape) * dtype.itemsize >= SMALL:
        return _pool.empty(shape, dtype)
    return like.new_empty(shape) if dtype == like.dtype else like.new_empty(shape, dtype=dtype)
