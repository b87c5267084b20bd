"""Point-to-point messages inside a CP group, posted now and waited for later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch.utils import dlpack

Message = tuple[int, torch.Tensor]
"""A rank of the group, and the contiguous tensor that goes to it or comes from it."""


class Work(Protocol):
    """Something under way that can be waited for: `dist.Work`, or what comes after it."""

    def wait(self) -> object: ...


class Pending:
    """Messages under way. The buffers live until they have been waited for.

    On CUDA they travel on a stream of the group's communicator, which waits for what the current stream had queued
    when they were posted. The stream that is current when they are waited for comes after them, so buffers that it
    allocated may be freed then, and used again at once. A `GradientStream` keeps those of another stream.
    """

    def __init__(self, works: Sequence[Work] = (), buffers: Sequence[torch.Tensor] = ()):
        self._works = works
        self._buffers = buffers

    def wait(self) -> None:
        """Return once what was received can be read and what was sent can be overwritten (on CUDA: by the current
        stream)."""
        for work in self._works:
            work.wait()
        self._works = self._buffers = ()


class Exchange(Protocol):
    """What a strategy needs of a process group. Messages between two ranks arrive in the order they were posted. A
    rank sends nothing to itself."""

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending: ...


class GroupExchange:
    """The messages of a `torch.distributed` process group (None: a group of one rank, which has nobody to talk to).

    Over gloo, tensors of a CUDA device are staged through the host, which then waits for the device at each message.
    That is for trying several ranks on one device, where NCCL refuses them.
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
        if not operations:  # which batch_isend_irecv does not take
            return Pending()
        works: list[Work] = [*dist.batch_isend_irecv(operations), *landings]
        return Pending(works, [tensor for _, tensor in (*sends, *receives)])

    def _through_host(self, sends: Sequence[Message], receives: Sequence[Message]) -> bool:
        """Whether the messages are on a CUDA device and the group's backend reads host memory alone, as gloo's
        point-to-point messages do: it would take a device's addresses for the host's."""
        on_device = any(tensor.is_cuda for _, tensor in (*sends, *receives))
        return on_device and "cuda:gloo" in str(dist.get_backend_config(self._group))


class _Landing:
    """Host memory for a message that is on its way to a CUDA tensor."""

    def __init__(self, tensor: torch.Tensor):
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._tensor = tensor

    def wait(self) -> None:
        """Copy what has arrived; the current stream comes after the copy."""
        self._tensor.copy_(self.host, non_blocking=True)


def _unrecorded(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor for which `record_stream` does nothing, on CUDA.

    NCCL's process group calls that for each point-to-point message, and then memory that is freed can be used again
    only when the host has seen that the network's stream is done. `Pending` makes that needless. Allocators other than
    PyTorch's own fail on memory that is not theirs, and are told as usual.
    """
    if not tensor.is_cuda or torch.cuda.get_allocator_backend() != "native":
        return tensor
    return dlpack.from_dlpack(dlpack.to_dlpack(tensor.detach()))  # type: ignore[attr-defined]


class Subset:
    """Some ranks of a group as a group of their own, whose rank i is `ranks[i]`. Its messages are the group's."""

    def __init__(self, exchange: Exchange, ranks: Sequence[int]):
        self._exchange = exchange
        self._ranks = ranks

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        sends, receives = ([(self._ranks[peer], x) for peer, x in messages] for messages in (sends, receives))
        return self._exchange.post(sends, receives)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over ranks are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32
