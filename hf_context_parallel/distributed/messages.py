"""Point-to-point messages within a CP group. They are posted at once and waited for later."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch.utils import dlpack

from .agreement import gather_numbers
from .buffers import new_buffer
from .leases import CLOSED
from .mesh import Ranks

Message = tuple[int, torch.Tensor]
"""Rank of the group, and the contiguous tensor to send to it or to receive from it."""


class Work(Protocol):
    """Operation in progress that can be waited for: `dist.Work`, or a copy that follows it."""

    def wait(self) -> object: ...


class Pending:
    """Messages in progress. Their buffers are kept alive until the messages have been waited for.

    On CUDA messages travel on a stream of the group's communicator. That stream first waits for the work that the
    current stream had queued when the messages were posted. In `wait`, the current stream waits for the messages. So
    buffers that it allocated may be freed then, and reused at once. Buffers of another stream are kept alive by
    `GradientStream.keep`.
    """

    def __init__(self, works: Sequence[Work] = (), buffers: Sequence[torch.Tensor] = ()):
        self._works = works
        self._buffers = buffers

    def wait(self) -> None:
        """Wait until received tensors can be read and sent tensors overwritten (on CUDA: by the current stream).

        Tensors made by `new_message` are never overwritten.
        """
        works = self._works
        for done, work in enumerate(works):
            self._works = works[done:]  # what is left if an error or a signal ends the wait
            work.wait()
        self._works = self._buffers = ()


class Exchange(Protocol):
    """Interface for the messages of a group.

    Messages between two ranks arrive in the order in which they were posted. A rank sends nothing to itself.
    """

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending: ...


@runtime_checkable
class SharesMemory(Protocol):
    """Exchange whose messages can be made, and read, in memory that ranks share."""

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Make a tensor with unspecified values that is sent without a copy, or return None."""
        ...


@runtime_checkable
class Closable(Protocol):
    """Exchange that has connections of its own."""

    def close(self) -> None: ...


class ClosedExchange:
    """Exchange of a group that was closed."""

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        raise RuntimeError(CLOSED)


class GroupExchange:
    """Messages of a `torch.distributed` process group. None is a group of one rank, which sends nothing.

    Args:
        group: the process group.
        lease: keeps the group alive, if it was made here.

    Over gloo, tensors of a CUDA device are staged through the host, and the host waits for the device at each message.
    This is meant for tests with several ranks on one device, which NCCL refuses.
    """

    def __init__(self, group: dist.ProcessGroup | None, lease: object = None):
        self._group, self._lease = group, lease

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        landings: list[_Landing] = []
        if self._through_host(sends, receives):
            landings = [_Landing(tensor) for _, tensor in receives]
            sends = [(peer, tensor.cpu()) for peer, tensor in sends]
            receives = [(peer, landing.host) for (peer, _), landing in zip(receives, landings)]
        operations = [
            dist.P2POp(operation, _unrecorded(tensor), group=self._group, group_peer=peer)
            for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in messages
        ]
        if not operations:  # batch_isend_irecv takes no empty list
            return Pending()
        works: list[Work] = [*dist.batch_isend_irecv(operations), *landings]
        return Pending(works, [tensor for _, tensor in (*sends, *receives)])

    def _through_host(self, sends: Sequence[Message], receives: Sequence[Message]) -> bool:
        """Return True if messages are on a CUDA device, and the backend can only read host memory.

        Point-to-point messages of gloo would take addresses of the device for addresses of the host.
        """
        on_device = any(tensor.is_cuda for _, tensor in (*sends, *receives))
        return on_device and "cuda:gloo" in str(dist.get_backend_config(self._group))


class _Landing:
    """Host memory for a message whose destination is a CUDA tensor."""

    def __init__(self, tensor: torch.Tensor):
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._tensor = tensor

    def wait(self) -> None:
        """Queue the copy of the message to its tensor on the current stream."""
        self._tensor.copy_(self.host, non_blocking=True)


def _unrecorded(tensor: torch.Tensor) -> torch.Tensor:
    """View of a CUDA tensor's memory for which `record_stream` does nothing.

    NCCL's process group calls `record_stream` for each point-to-point message. Freed memory is then reused only after
    the host has seen that the stream of the network is done. `Pending` makes this unnecessary. Allocators other than
    PyTorch's native one fail on memory that they did not allocate, so with them the tensor itself is returned.
    """
    if not tensor.is_cuda or torch.cuda.get_allocator_backend() != "native":
        return tensor
    return dlpack.from_dlpack(dlpack.to_dlpack(tensor.detach()))  # type: ignore[attr-defined]


class Subset:
    """Messages of a subgroup, whose rank i is rank `ranks[i]` of the group. They are sent by the group's exchange."""

    def __init__(self, exchange: Exchange, ranks: Sequence[int]):
        self.exchange = exchange
        self._ranks = ranks

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        sends, receives = ([(self._ranks[peer], x) for peer, x in messages] for messages in (sends, receives))
        return self.exchange.post(sends, receives)


class CheckedExchange:
    """Exchange of a group that counts its messages, and sends no more after a step that ended by an error.

    Messages between two ranks have no names, so a message of that step that nobody has taken would be taken for one of
    the next step. So nothing is posted until the ranks have settled that none is left.

    Args:
        exchange: the exchange that carries the messages.
        size: the number of ranks of the group.
    """

    def __init__(self, exchange: Exchange, size: int):
        self.carrier = exchange
        self._sent, self._received = [0] * size, [0] * size
        self._left: list[Pending] = []
        self.interrupted = False
        """True after a step of this rank that ended by an error, until the ranks have settled."""

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if self.interrupted:
            raise RuntimeError(
                "an error ended a step of this CP group while its messages were on their way, and the ranks have not "
                "agreed since then that all have arrived. Begin a new batch on all ranks of the group, by the call of "
                "a prepared model, cp.shard or cp.attention. Gradients of earlier batches are lost."
            )
        for counts, messages in ((self._sent, sends), (self._received, receives)):
            for peer, _ in messages:
                counts[peer] += 1
        return self.carrier.post(sends, receives)

    def close(self) -> None:
        """Send nothing any more, and end the connections of shared memory."""
        exchange, self.carrier = self.carrier, ClosedExchange()
        self._left.clear()
        if isinstance(exchange, Closable):
            exchange.close()

    def interrupt(self, left: Sequence[Pending] = ()) -> None:
        """Post nothing until `settle`, and keep the buffers of messages that were not waited for alive until then.

        They are not waited for here: a message never comes if its sender has failed too.
        """
        self.interrupted = True
        self._left += left

    def settle(self, ranks: Ranks) -> None:
        """Go on after an interruption on any rank, if each message was both sent and received. All ranks call this.

        Raises:
            ValueError: on all ranks, naming two of them between which a message is left.
        """
        counts = gather_numbers(ranks, *self._sent, *self._received)
        for sender in range(ranks.size):
            for receiver in range(ranks.size):
                sent, received = counts[receiver][sender], counts[ranks.size + sender][receiver]
                if sent != received:
                    raise ValueError(
                        f"an error ended an earlier step of this CP group in its middle: rank {sender} of the group "
                        f"has sent {sent} messages to rank {receiver}, which has received {received}. The next step "
                        "would take what is left for its own, so the group cannot go on. Start the processes again."
                    )
        for pending in self._left:
            pending.wait()
        self._left.clear()
        self._sent, self._received = [0] * ranks.size, [0] * ranks.size
        self.interrupted = False


class in_flight:
    """Exchange for the messages of a `with` block. An error in the block leaves no buffer to be written late.

    A `CheckedExchange` is interrupted, and keeps the buffers of messages that were not waited for alive. Messages of
    another exchange are waited for.
    """

    def __init__(self, exchange: Exchange):
        self.exchange = exchange
        self._posted: list[Pending] = []
        """All messages of the block. Those that were waited for hold nothing any more."""

    def __enter__(self) -> in_flight:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        if kind is not None:
            self._interrupt()

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        pending = self.exchange.post(sends, receives)
        self._posted.append(pending)
        return pending

    def _interrupt(self) -> None:
        exchange = _checked(self.exchange)
        if isinstance(exchange, CheckedExchange):
            exchange.interrupt(self._posted)
            return
        for pending in self._posted:
            with suppress(Exception):  # the error of the block is raised
                pending.wait()


def _checked(exchange: Exchange) -> Exchange:
    """Exchange of the whole group, behind those of a block and of a subgroup."""
    while isinstance(exchange, (Subset, in_flight)):
        exchange = exchange.exchange
    return exchange


def _sharing(exchange: Exchange, like: torch.Tensor) -> SharesMemory | None:
    """Exchange that carries the messages, if it shares memory for tensors on the device of `like`."""
    if not like.is_cpu:
        return None
    carrier = _checked(exchange)
    if isinstance(carrier, CheckedExchange):
        carrier = carrier.carrier
    return carrier if isinstance(carrier, SharesMemory) else None


def shares_memory(exchange: Exchange, like: torch.Tensor) -> bool:
    """Return True if messages like a tensor may lie in memory that ranks share."""
    return _sharing(exchange, like) is not None


def new_message(exchange: Exchange, like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Make a tensor with unspecified values, of which runs of rows are sent.

    It is filled before the first of them is posted, and never written again, even when that has been waited for: other
    ranks may read it where it lies.

    Args:
        exchange: the exchange that sends them.
        like: tensor whose device it is on.
        dtype: its dtype; that of `like` unless given.
    """
    dtype = like.dtype if dtype is None else dtype
    sharing = _sharing(exchange, like)
    lent = None if sharing is None else sharing.lend(shape, dtype)
    return new_buffer(like, *shape, dtype=dtype) if lent is None else lent


def new_landing(exchange: Exchange, like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Make a tensor for one message that `exchange` receives, which is read and never written.

    It has no memory until that is waited for, if it can lie where the sender has made the message. So it has no views
    until then.

    Args:
        like: tensor whose device and dtype it has.
    """
    if not shares_memory(exchange, like):
        return new_buffer(like, *shape)
    landing = like.new_empty(shape)
    landing.untyped_storage().resize_(0)
    return landing


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype: the dtype of sums over ranks, for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
