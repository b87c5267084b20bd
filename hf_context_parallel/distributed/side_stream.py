"""A stream of its own for sums that travel, beside the kernels that make the next ones."""

from __future__ import annotations

from functools import cache

import torch


class GradientStream:
    """A stream on which sums of gradients travel and are added to, beside the kernels that make the next ones.

    On CUDA it is a stream of its own. What is posted, waited for or computed inside of `with stream` is queued on it,
    and what is allocated there belongs to it. Elsewhere all is done when its call returns, and this does nothing.

    What the kernels' stream made and this one uses must not be freed before this one is done with it, or the kernels'
    stream would overwrite it. So it is kept here, and the kernels' stream waits before it is let go: for what was
    queued here a step ago, so that it stalls nobody. `Tensor.record_stream` would keep it until the host sees that
    this stream is done, and a host runs many steps ahead of its device.
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
        """Queue what follows on this stream after what the current stream has queued till now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def keep(self, tensor: torch.Tensor | None) -> None:
        """Keep `tensor`, which the current stream made, until this stream has done what is queued on it now. What was
        kept before is let go."""
        if self._stream is not None:
            done = self._stream.record_event()
            self._let_go()
            self._kept = tensor, done

    def join(self) -> None:
        """Let the current stream wait for all that is queued on this one."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._let_go()

    def _let_go(self) -> None:
        if self._stream is not None and self._kept is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._kept[1])
            self._kept = None


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The one CUDA stream of a device for this: memory that is freed on a stream is for that stream alone. Its
    priority is high since what it computes is small and others wait for it."""
    return torch.cuda.Stream(device, priority=-1)
