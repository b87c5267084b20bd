"""Gradient stream: a second CUDA stream for sums of gradients."""

from __future__ import annotations

from functools import cache

import torch


class GradientStream:
    """Stream on which sums of gradients are sent and added, while kernels compute the next gradients.

    On CUDA it is a second stream. Messages and kernels inside of `with stream` are queued on it, and tensors that are
    allocated there belong to it. On other devices each call is complete when it returns, and this class does nothing.

    Tensors made on the stream of the kernels are also used here. If one were freed before this stream has used it, the
    stream of the kernels could overwrite it. So `keep` holds the tensor, and the stream of the kernels waits before
    the tensor is freed. It waits for work that was queued a step ago, so it does not stall. `Tensor.record_stream`
    would hold the tensor until the host has seen that this stream is done, and the host runs many steps ahead of the
    device.
    """

    def __init__(self, device: torch.device):
        self._stream = _beside(device) if device.type == "cuda" else None
        self._kept: tuple[torch.Tensor | None, torch.cuda.Event] | None = None

    def __enter__(self) -> None:
        if self._stream is not None:
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()

    def __exit__(self, *raised: object) -> None:
        if self._stream is not None:
            self._context.__exit__(*raised)

    def follow(self) -> None:
        """Make later work on this stream wait for all work that the current stream has queued so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def keep(self, tensor: torch.Tensor | None) -> None:
        """Hold `tensor`, which the current stream made, until this stream has finished its queued work.

        The tensor that was held before is freed.
        """
        if self._stream is not None:
            done = self._stream.record_event()
            self._let_go()
            self._kept = tensor, done

    def join(self) -> None:
        """Make the current stream wait for all work that is queued on this one."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._let_go()

    def _let_go(self) -> None:
        if self._stream is not None and self._kept is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._kept[1])
            self._kept = None


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """Gradient stream of a device.

    There is one for each device, since memory that is freed on a stream can be reused only by that stream. Its
    priority is high, since its kernels are short and other ranks wait for them.
    """
    return torch.cuda.Stream(device, priority=-1)
