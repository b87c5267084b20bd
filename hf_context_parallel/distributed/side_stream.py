"""A stream of its own for sums that travel, beside the kernels that make the next ones."""

from __future__ import annotations

from functools import cache

import torch


class Lane:
    """Where sums travel and are added to, beside the kernels that make the next ones.

    On CUDA that is a stream of its own. What is posted, waited for or computed inside of `with lane` is queued there,
    and what is allocated there is the lane's. Elsewhere all is done when its call returns, and a lane does nothing.

    What the kernels' stream made and the lane uses must not be freed before the lane is done with it, or the kernels'
    stream would overwrite it. So the lane keeps it, and the kernels' stream waits before it is let go: for what the
    lane did a step ago, so that it stalls nobody. `Tensor.record_stream` would keep it until the host sees that the
    lane is done, and a host runs many steps ahead of its device.
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
        """What is queued on the lane from now on comes after what the current stream has queued till now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def keep(self, tensor: torch.Tensor | None) -> None:
        """Keep `tensor`, which the current stream made, until the lane has done what is queued there now. What was
        kept before is let go."""
        if self._stream is not None:
            done = self._stream.record_event()
            self._let_go()
            self._kept = tensor, done

    def join(self) -> None:
        """What the current stream queues from now on comes after all that is queued on the lane."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._let_go()

    def _let_go(self) -> None:
        if self._kept is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._kept[1])
            self._kept = None


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The stream of all lanes of a device: memory that is freed on a stream is for that stream alone. Its priority is
    high since what it computes is small and others wait for it."""
    return torch.cuda.Stream(device, priority=-1)
