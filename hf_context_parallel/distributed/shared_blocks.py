"""Memory of messages that several processes of a machine map, in files made by `memfd_create`.

Such files need no space in /dev/shm, and have no name that a dead process would leave behind. They are closed as soon
as all ranks that may read them have mapped them, since a process may have few open files.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from functools import cache, partial
from math import prod
from typing import Any
from weakref import WeakSet, finalize

import torch

from .buffers import SMALL, IdleBlocks, capacity_for, is_kept, lease, lying_in

MOST_OPEN = 128
"""Files of a process that are kept open for ranks that have not mapped them. With more, no memory is lent."""


MADV_REMOVE = 9
"""Advice of madvise(2) that frees the memory behind a mapped file."""


class Block:
    """Memory file that this rank writes, and other ranks read.

    Args:
        number: its number among the blocks of this rank.
        capacity: its bytes.
        readers: the ranks that may read it.

    Attributes:
        memory: its content, as bytes.
        mapped_by: the ranks that have mapped it.
        is_lent: True if a tensor of this rank may lie in it.
        unread: number of messages that were sent from it and have not been read.
        is_kept: True if it keeps its memory while it is free.

    Raises:
        OSError: if the system makes no such file, or cannot map it.
    """

    def __init__(self, number: int, capacity: int, readers: frozenset[int]):
        self.number, self.readers = number, readers
        self.mapped_by: set[int] = set()
        self.is_lent, self.unread, self.is_kept = False, 0, True
        self._descriptor = os.memfd_create("hf_context_parallel")
        self._closing = finalize(self, os.close, self._descriptor)
        _open_blocks.add(self)
        os.ftruncate(self._descriptor, capacity)
        self.memory = map_file(self._descriptor, capacity, for_writing=True)

    @property
    def is_free(self) -> bool:
        return not self.is_lent and not self.unread

    def descriptor_for(self, rank: int) -> int | None:
        """Descriptor for a rank to map the block, to be closed by the caller. None if that rank has mapped it."""
        if rank in self.mapped_by:
            return None
        if len(self.mapped_by) + 1 < len(self.readers):
            descriptor = os.dup(self._descriptor)
        else:
            self._closing.detach()
            _open_blocks.discard(self)
            descriptor = self._descriptor
        self.mapped_by.add(rank)
        return descriptor


_open_blocks: WeakSet[Block] = WeakSet()
"""Blocks of this process whose file is open."""


class OwnBlocks:
    """Memory from which this rank sends messages to the ranks of a group.

    A block is used again when no tensor lies in it, and all messages from it have been read. `IdleBlocks` bounds what
    is kept for that. Any rank may read memory that is lent. Copies for a rank have blocks that it alone reads, so that
    few blocks are resident in the memory of each rank.
    """

    def __init__(self, readers: Iterable[int]):
        self._readers = frozenset(readers)
        self._made = 0
        self._blocks: dict[int, Block] = {}
        """All blocks by their number."""
        self._at: dict[int, Block] = {}
        """The same by the address of their memory."""
        self._idle: defaultdict[frozenset[int], IdleBlocks[Block]] = defaultdict(IdleBlocks)
        """Blocks that are free, by their readers."""
        self._returned: deque[Block] = deque()
        """Blocks that no tensor lies in any more. Any thread may add to them at any moment."""

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Make a tensor with unspecified values in a block of its own.

        It is None for few bytes, which are copied in less time, and if no more files can be open.
        """
        size = prod(shape) * dtype.itemsize
        if size < SMALL or len(_open_blocks) >= MOST_OPEN:
            return None
        try:
            block = self._take(size, self._readers)
        except OSError:  # ordinary memory serves too
            return None
        block.is_lent = True
        return lying_in(lease(block.memory, 0, size, partial(self._returned.append, block)), shape, dtype)

    def holding(self, tensor: torch.Tensor, reader: int) -> tuple[Block, int]:
        """Find the block that a contiguous tensor lies in, and where it begins. Any other tensor is copied to one.

        Args:
            reader: the rank that reads it.
        """
        block = self._at.get(tensor.untyped_storage().data_ptr())
        if block is not None and block.is_lent:
            return block, int(tensor.storage_offset()) * tensor.itemsize
        block = self._take(tensor.nbytes, frozenset([reader]))
        block.memory[: tensor.nbytes].copy_(bytes_of(tensor))
        return block, 0

    def was_read(self, number: int) -> None:
        """Take in that a message of a block has been read."""
        block = self._blocks[number]
        block.unread -= 1
        self._put_if_free(block)

    def release(self) -> list[Block]:
        """Forget blocks that have not been used for long, and return them."""
        released = [block for idle in self._idle.values() for block in idle.release()]
        for block in released:
            del self._blocks[block.number], self._at[block.memory.data_ptr()]
        return released

    def _take(self, size: int, readers: frozenset[int]) -> Block:
        while self._returned:
            block = self._returned.popleft()
            block.is_lent = False
            self._put_if_free(block)
        found = self._idle[readers].take(size)
        if found is None:
            found = Block(self._made, capacity_for(size), readers)
            self._made += 1
            self._blocks[found.number] = self._at[found.memory.data_ptr()] = found
        found.is_kept = is_kept()
        return found

    def _put_if_free(self, block: Block) -> None:
        if block.is_free:
            if not block.is_kept:
                empty(block.memory)
            self._idle[block.readers].put(len(block.memory), block)


def has_no_memory(tensor: torch.Tensor) -> bool:
    """Return True if a tensor has elements, but no memory for them; see `new_landing`."""
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """View the bytes of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8)


def map_file(descriptor: int, size: int, for_writing: bool) -> torch.Tensor:
    """Map a file into memory, as bytes. Writing to memory that is mapped for reading ends the process.

    `mmap.mmap` of Python would keep a descriptor of its own open.

    Raises:
        OSError: if the system refuses it.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if for_writing else 0)
    address = _libc().mmap(None, size, protection, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, f"{size} bytes for a message cannot be mapped: {os.strerror(error)}")
    memory = (ctypes.c_ubyte * size).from_address(address)
    finalize(memory, _libc().munmap, address, size).atexit = False
    with torch.inference_mode(False):  # so that memory which evaluation made serves training
        return torch.frombuffer(memory, dtype=torch.uint8)


def leave(memory: torch.Tensor) -> None:
    """Let the resident memory of this process have no part of a mapped file until it is read again.

    The file may hold what its rank saves for backward, and counts there. Here that of all layers would add up.
    """
    _libc().madvise(memory.data_ptr(), len(memory), mmap.MADV_DONTNEED)


def empty(memory: torch.Tensor) -> None:
    """Give the memory of a mapped file back to the system, in all processes. It is zeros from then on."""
    _libc().madvise(memory.data_ptr(), len(memory), MADV_REMOVE)


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library
