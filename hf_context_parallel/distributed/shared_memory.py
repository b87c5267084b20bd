"""Messages between ranks of one machine through shared memory, for tensors on the CPU.

Gloo sends such messages through TCP: cores copy them in pieces into the kernel and out of it, and threads of gloo wake
up for each piece. Here messages lie in memory of the sender that other ranks have mapped (`OwnBlocks`). A tensor made
there (`new_message`) is sent without a copy, and any other is copied there once. The receiver copies a message out, or
reads it where it lies if its tensor has no memory of its own (`new_landing`).

Each pair of ranks has a Unix socket for control packets, which also carries the descriptors of memory files. Packets
say that memory holds a message, or has been read. Flags in the shared memory could say so too, but a socket blocks in
the kernel, orders the accesses of two cores to memory, and ends when the peer dies.

- Posting waits for no peer, since two ranks that post to each other could wait forever. If no memory is free, more is
  made. Packets that a socket has no room for are queued by the sender.
- A waiting rank polls all its sockets, takes in what has arrived on any of them, and sends what is queued. So it holds
  up no rank but by its own messages.
- The receiver says that it has read a message when it has copied it, or when no tensor lies in it any more. It says
  the latter with its next message or wait, since tensors may be freed at any moment, by any thread.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import WeakSet, finalize

import torch
import torch.distributed as dist

from .agreement import gather_numbers
from .buffers import PAGE, is_kept, lease
from .mesh import Ranks
from .messages import Exchange, GroupExchange, Message, Pending, Work
from .process_groups import timeout_of_world
from .shared_blocks import Block, OwnBlocks, bytes_of, has_no_memory, leave, map_file

logger = logging.getLogger(__name__)

MESSAGE, READ, RELEASED = range(3)
"""Kinds of packets: a block holds a message, a message of a block has been read, and a block is not used any more."""
PACKET = struct.Struct("<5q")
"""Control packet: its kind, the number of the block among those of the rank that made it, where in it the message
begins, the bytes of the message, and the bytes of the block if it is new to the receiver, else 0. The descriptor of a
new block comes along."""
HELLO = struct.Struct("<16sq")
"""First packet of a connection: the secret of the rank that is called, and the calling rank."""
LONGEST_POLL = 3600.0
"""Seconds that a single poll may take; the kernel counts them in milliseconds of 32 bits."""


def make_exchange(ranks: Ranks) -> Exchange:
    """Make the exchange of a group. Every rank of the group must call this.

    Messages go through shared memory if the group's tensors are on the CPU and all its ranks reach each other so, and
    through the process group otherwise.
    """
    group = GroupExchange(ranks.group, ranks.lease)
    if ranks.size == 1 or ranks.device.type != "cpu":
        return group
    sockets = _connect(ranks)
    if sockets is None:
        logger.info("the %d ranks of this group do not share memory, so messages go through gloo", ranks.size)
        return group
    return SharedMemoryExchange(sockets, group, timeout_of_world())


class SharedMemoryExchange:
    """Messages of ranks that share a machine. Threads may use it one after another.

    Args:
        sockets: the connection to each other rank of the group.
        group: the exchange for tensors that are not on the CPU.
        timeout: longest time to wait for a message.

    Raises:
        DistNetworkError: in `post` or `wait`, if the peer is gone, or its message does not arrive in time.
    """

    def __init__(self, sockets: dict[int, socket.socket], group: Exchange, timeout: timedelta):
        self._own = OwnBlocks(sockets)
        self._links = {rank: _Link(rank, connection, self._own) for rank, connection in sockets.items()}
        self._group = group
        self._timeout = timeout.total_seconds()
        _open_sockets.update(sockets.values())
        _close_in_forks()
        self._closing = finalize(self, _close, list(sockets.values()))

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if any(tensor.device.type != "cpu" for _, tensor in (*sends, *receives)):
            return self._group.post(sends, receives)
        for peer, tensor in sends:
            self._links[peer].send(tensor)
        for unused in self._own.release():
            for rank in unused.mapped_by:
                self._links[rank].forget(unused.number)
        queued = {peer for peer, _ in sends if self._links[peer].queue}
        works: list[Work] = [_Departure(self, self._links[peer]) for peer in queued]
        works += [_Arrival(self, self._links[peer], self._links[peer].expect(), tensor) for peer, tensor in receives]
        return Pending(works)

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        return self._own.lend(shape, dtype)

    def progress(self, link: _Link, deadline: float) -> None:
        """Wait until something arrives from any rank, or a socket has room for what is queued.

        Raises:
            DistNetworkError: if the deadline passes, naming the rank of `link`.
        """
        poll = select.poll()
        links = {other.socket.fileno(): other for other in self._links.values() if not other.ended}
        for descriptor, other in links.items():
            poll.register(descriptor, select.POLLIN | (select.POLLOUT if other.queue else 0))
        left = deadline - time.monotonic()
        ready = poll.poll(1000 * min(max(left, 0.0), LONGEST_POLL))
        if not ready and left <= 0:
            raise dist.DistNetworkError(
                f"rank {link.rank} of the group did not answer within {self._timeout:g} s, the timeout of the process "
                "group"
            )
        for descriptor, _ in ready:
            links[descriptor].read()
            links[descriptor].flush()

    def close(self) -> None:
        """End the connections, and forget the memory of messages. The exchange posts nothing any more."""
        self._closing()
        self._links.clear()

    def deadline(self) -> float:
        return time.monotonic() + self._timeout


@dataclass(frozen=True)
class _Departure:
    """Messages to a rank some of whose packets the socket had no room for."""

    exchange: SharedMemoryExchange
    link: _Link

    def wait(self) -> None:
        deadline = self.exchange.deadline()
        while self.link.queue:
            self.link.refuse_if_ended()
            self.exchange.progress(self.link, deadline)
            self.link.refuse_if_ended()  # the queue may have been dropped


@dataclass(frozen=True)
class _Arrival:
    """Message of a rank by its number, for `tensor`."""

    exchange: SharedMemoryExchange
    link: _Link
    number: int
    tensor: torch.Tensor

    def wait(self) -> None:
        self.link.read()
        deadline = self.exchange.deadline()
        while self.number not in self.link.arrived:
            self.link.refuse_if_ended()
            self.exchange.progress(self.link, deadline)
        self.link.receive(self.number, self.tensor)


class _Message(NamedTuple):
    """Message that has arrived: the number and the memory of its block, and where it lies there."""

    block: int
    memory: torch.Tensor
    start: int
    size: int


class _Link:
    """Connection to another rank of the group.

    Args:
        own: the memory from which this rank sends messages, to this and to other ranks.
    """

    def __init__(self, rank: int, connection: socket.socket, own: OwnBlocks):
        self.rank, self.socket, self._own = rank, connection, own
        self.queue: deque[tuple[bytes, int | None]] = deque()
        """Packets and descriptors that the socket had no room for."""
        self.arrived: dict[int, _Message] = {}
        """Messages that have arrived and were not waited for, by their number."""
        self.ended = False
        """True if the peer has closed the connection, and all that it sent has been read."""
        self._expected = self._taken_in = 0
        self._mapped: dict[int, torch.Tensor] = {}
        """Memory of the peer's blocks."""
        self._left: deque[int] = deque()
        """Blocks of messages in which no tensor lies any more, about which the peer was not told."""

    def send(self, tensor: torch.Tensor) -> None:
        self.read()  # memory may be free again
        block, start = self._own.holding(tensor, self.rank)
        descriptor, made = block.descriptor_for(self.rank), 0
        if descriptor is not None:
            made = len(block.memory)
        block.unread += 1
        self._write(PACKET.pack(MESSAGE, block.number, start, tensor.nbytes, made), descriptor)
        self.refuse_if_ended()

    def forget(self, block: int) -> None:
        """Tell the peer that a block is not used any more."""
        self._write(PACKET.pack(RELEASED, block, 0, 0, 0))

    def expect(self) -> int:
        """Number of the next message that is to be received."""
        self._expected += 1
        return self._expected - 1

    def receive(self, number: int, tensor: torch.Tensor) -> None:
        """Take a message that has arrived: copy it to `tensor`, or put `tensor` where it lies.

        Raises:
            RuntimeError: if the message has another size.
        """
        block, memory, start, size = self.arrived[number]
        if size != tensor.nbytes:
            raise RuntimeError(f"rank {self.rank} of the group sent {size} bytes where {tensor.nbytes} were expected")
        if has_no_memory(tensor):
            storage = lease(memory, start, size, partial(self._left.append, block))
            # A step that ended by an error may have had another mode than the one that waits.
            with torch.inference_mode(tensor.is_inference()):
                tensor.set_(storage, 0, tensor.shape, tensor.stride())
            del self.arrived[number]
            return
        bytes_of(tensor).copy_(memory[start : start + size])
        if not is_kept():
            leave(memory)
        del self.arrived[number]
        self._write(PACKET.pack(READ, block, 0, 0, 0))

    def read(self) -> None:
        """Say what has been read, and take in all that has arrived, without waiting."""
        while self._left:
            block = self._left.popleft()
            leave(self._mapped[block])
            self._write(PACKET.pack(READ, block, 0, 0, 0))
        self._take_in_all()

    def _take_in_all(self) -> None:
        while not self.ended:
            try:
                packet, descriptors, _, _ = socket.recv_fds(self.socket, PACKET.size, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except ConnectionResetError:  # the peer left something unread when it closed, and what it sent follows
                continue
            if packet:
                self._take_in(packet, descriptors)
            else:
                self.ended = True

    def _take_in(self, packet: bytes, descriptors: list[int]) -> None:
        kind, number, start, size, made = PACKET.unpack(packet)
        if kind == READ:
            self._own.was_read(number)
        elif kind == RELEASED:
            del self._mapped[number]
        else:
            if made and not descriptors:  # the kernel drops them then
                raise OSError(errno.EMFILE, "a message cannot be received, since this process has too many open files")
            for descriptor in descriptors:
                self._mapped[number] = map_file(descriptor, made, for_writing=False)
                os.close(descriptor)
            self.arrived[self._taken_in] = _Message(number, self._mapped[number], start, size)
            self._taken_in += 1

    def flush(self) -> None:
        """Send what is queued, as far as the socket has room for it."""
        while self.queue and self._sent_now(*self.queue[0]):
            self.queue.popleft()

    def _write(self, packet: bytes, descriptor: int | None = None) -> None:
        self.flush()
        if self.queue or not self._sent_now(packet, descriptor):
            self.queue.append((packet, descriptor))

    def _sent_now(self, packet: bytes, descriptor: int | None) -> bool:
        """Send a packet and close its descriptor. Return False if the socket has no room.

        A packet to a peer that is gone is dropped. That is no error of a peer that gets no message any more.
        """
        try:
            if descriptor is not None and not self.ended:
                socket.send_fds(self.socket, [packet], [descriptor], socket.MSG_NOSIGNAL)
            elif not self.ended:
                self.socket.send(packet, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            self._take_in_all()  # up to the end of what it sent
        if descriptor is not None:
            os.close(descriptor)
        return True

    def refuse_if_ended(self) -> None:
        """Raise if the peer is gone.

        Raises:
            DistNetworkError: naming its rank.
        """
        if self.ended:
            raise dist.DistNetworkError(f"rank {self.rank} of the group closed its connection: it failed or ended")


_open_sockets: WeakSet[socket.socket] = WeakSet()


@cache
def _close_in_forks() -> None:
    """Let processes that this one forks, such as data workers, close their copies of the sockets.

    A connection ends for the peer only when all copies are closed.
    """
    os.register_at_fork(after_in_child=lambda: _close(list(_open_sockets)))


def _close(sockets: Iterable[socket.socket]) -> None:
    for connection in sockets:
        connection.close()


def _connect(ranks: Ranks) -> dict[int, socket.socket] | None:
    """Connect all ranks of a group with each other. Every rank must call this.

    Names of abstract sockets mean nothing on other machines, so ranks of several machines do not reach each other.

    Returns:
        The socket to each other rank; None on all ranks if any of them cannot connect.
    """
    secret, listener = secrets.token_bytes(16), _listen(ranks.size)
    every: list[Any] = [None] * ranks.size
    dist.all_gather_object(every, listener and (listener.getsockname(), secret), group=ranks.group)
    sockets: dict[int, socket.socket] = {}
    callers = {HELLO.pack(secret, rank): rank for rank in range(ranks.rank + 1, ranks.size)}
    reached = None not in every
    if reached:
        with suppress(OSError):
            for rank, (name, its_secret) in enumerate(every[: ranks.rank]):
                sockets[rank] = _call(name, HELLO.pack(its_secret, ranks.rank))
    reached = _all(ranks, reached and len(sockets) == ranks.rank)
    if reached and listener is not None:
        with suppress(OSError):  # all that call have called, so nothing is waited for
            while len(sockets) < ranks.size - 1:
                caller = listener.accept()[0]
                caller.setblocking(False)
                hello = caller.recv(HELLO.size)
                if hello in callers:
                    sockets[callers[hello]] = caller
                else:  # any process of the machine may call
                    caller.close()
    reached = _all(ranks, reached and len(sockets) == ranks.size - 1)
    _close([listener] if listener else [])
    if not reached:
        _close(sockets.values())
    return sockets if reached else None


def _listen(size: int) -> socket.socket | None:
    """Socket that other ranks can call. None if this system lacks something that messages need."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return None
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.setblocking(False)
        listener.bind(f"\0hf_context_parallel/{secrets.token_hex(16)}")
        listener.listen(size)
        Block(0, PAGE, frozenset())  # sandboxes may forbid it
    except OSError:
        return None
    return listener


def _call(name: bytes, hello: bytes) -> socket.socket:
    """Connect to the listener of another rank.

    Raises:
        OSError: if it cannot be reached.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(False)
        connection.connect(name)
        connection.send(hello)
    except OSError:
        connection.close()
        raise
    return connection


def _all(ranks: Ranks, flag: bool) -> bool:
    """Return True on every rank if the flag of every rank is True."""
    return all(gather_numbers(ranks, flag)[0])
