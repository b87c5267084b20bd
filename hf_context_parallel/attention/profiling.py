"""Names for what attention does, which profilers show: `cp/forward/step2/compute`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A range of a torch profile called `cp/{name}`; nothing if no profiler runs, as it would cost 30 us."""
    return profiler.record_function(f"cp/{name}") if profiler._is_profiler_enabled else _NOTHING
