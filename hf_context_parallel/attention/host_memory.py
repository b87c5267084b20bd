"""Host memory for tensors that the device needs again only in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


class HostMemory:
    """Copies tensors of a device to the host and back, on a stream of its own, while kernels run.

    On CUDA the host's memory is pinned. On a CPU each copy is complete when it returns.

    Args:
        device: device of the tensors.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: tuple[tuple[torch.Tensor, ...], tuple[int, ...], torch.cuda.Event | None] | None = None

    def hold(self, *tensors: torch.Tensor) -> OnHost:
        """Begin to copy tensors to the host.

        The tensors are held until the next call. They may not be changed in place until then.

        Raises:
            RuntimeError: if the tensors of the call before were.
        """
        self.release()
        with self.beside():
            copies = tuple(
                torch.empty(x.shape, dtype=x.dtype, pin_memory=self._stream is not None).copy_(x, non_blocking=True)
                for x in tensors
            )
            self._leaving = tensors, tuple(x._version for x in tensors), self.done()
        return OnHost(self, copies)

    def release(self) -> None:
        """Let go of the tensors that are being copied to the host, once the copies are done."""
        if self._leaving is None:
            return
        tensors, versions, done = self._leaving
        self._leaving = None
        self.wait(done)
        for tensor, version in zip(tensors, versions):
            check_unchanged(tensor, version)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Copy on the stream of this memory in this block, after all that the current stream has queued."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def write(self, tensor: torch.Tensor) -> None:
        """Keep the memory of a tensor that is being written, even if the tensor is dropped unused."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def done(self) -> torch.cuda.Event | None:
        """Return an event that happens when all copies so far are done."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, done: torch.cuda.Event | None) -> None:
        """Make the current stream wait for an event."""
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)


class OnHost:
    """Tensors in host memory.

    Args:
        memory: memory that they are in.
        copies: the tensors on the host.
    """

    def __init__(self, memory: HostMemory, copies: tuple[torch.Tensor, ...]):
        self._memory, self._copies = memory, copies
        self._fetched: tuple[tuple[torch.Tensor, ...], torch.cuda.Event | None] | None = None

    def fetch(self) -> None:
        """Begin to copy the tensors to the device, if that has not begun."""
        if self._fetched is not None:
            return
        memory = self._memory
        memory.release()
        # The current stream allocates, since it is the one that uses the tensors and frees them.
        tensors = tuple(torch.empty_like(x, device=memory.device, pin_memory=False) for x in self._copies)
        with memory.beside():
            for tensor, copy in zip(tensors, self._copies):
                tensor.copy_(copy, non_blocking=True)
                memory.write(tensor)
            self._fetched = tensors, memory.done()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors on the device, and let go of them there."""
        self.fetch()
        assert self._fetched is not None
        (tensors, done), self._fetched = self._fetched, None
        self._memory.wait(done)
        return tensors


@cache
def host_memory(device: torch.device) -> HostMemory:
    """Return the host memory for the tensors of a device. There is one, so that copies follow each other."""
    return HostMemory(device)


def check_unchanged(tensor: torch.Tensor, version: int) -> None:
    """Refuse a tensor that was changed in place.

    Args:
        version: its version when it was kept.

    Raises:
        RuntimeError: naming its shape.
    """
    if tensor._version != version:
        raise RuntimeError(
            f"a layer has changed the output of attention, of shape {tuple(tensor.shape)}, in place, and gradient "
            "checkpointing was to use it again. Change a copy, or set attention_checkpoints='off'."
        )
