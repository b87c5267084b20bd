"""Named ranges of attention for profilers, such as `cp/forward/step2/compute`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

_NOTHING = nullcontext()


def span(direction: str, what: str, step: int | None = None) -> AbstractContextManager[object]:
    """Range `cp/{direction}/step{step}/{what}` of a torch profile.

    Without a profiler none is recorded, and no name is made: that would take 30 us, and this check takes less than 1.
    """
    if not profiler._is_profiler_enabled:
        return _NOTHING
    return profiler.record_function(f"cp/{direction}/{what}" if step is None else f"cp/{direction}/step{step}/{what}")
