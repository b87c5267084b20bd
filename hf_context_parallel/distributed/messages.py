"""Point-to-point messages within a CP group. They are posted at once and waited for later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch.utils import dlpack

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
        """Wait until received tensors can be read and sent tensors overwritten (on CUDA: by the current stream)."""
        for work in self._works:
            work.wait()
        self._works = self._buffers = ()


class Exchange(Protocol):
    """Interface for the messages of a group.

    Messages between two ranks arrive in the order in which they were posted. A rank sends nothing to itself.
    """

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending: ...


class GroupExchange:
    """Messages of a `torch.distributed` process group. None is a group of one rank, which sends nothing.

    Over gloo, tensors of a CUDA device are staged through the host, and the host waits for the device at each message.
    This is meant for tests with several ranks on one device, which NCCL refuses.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group

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
        self._exchange = exchange
        self._ranks = ranks

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        sends, receives = ([(self._ranks[peer], x) for peer, x in messages] for messages in (sends, receives))
        return self._exchange.post(sends, receives)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype: the dtype of sums over ranks, for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
