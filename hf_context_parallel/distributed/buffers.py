"""Memory that is kept to be used again, since each 4 KiB of memory that is new to a process cost a page fault."""

from __future__ import annotations

from typing import Generic, TypeVar

Block = TypeVar("Block")

PATIENCE = 64
"""Number of requests that an idle block waits for one that it serves. Then it is released."""
EXCESS = 8
"""Largest ratio of the bytes of a block to the power of two that is asked for."""
PAGE = 4096


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
