"""Peak memory of a stretch of work, above the memory in use at its start."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIB = 2**30


class PeakMemory:
    """Measures the peak memory of one process: on CUDA by PyTorch's allocator, on a CPU by the resident set size.

    On a CPU it needs Linux, which records the peak of a process and resets it on request. Elsewhere nothing is
    measured.

    Args:
        device: the device that the process computes on.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._base: int | None = None

    def start(self) -> None:
        """Begin a measurement."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        elif os.access(CLEAR_REFS, os.W_OK):
            # Freed memory that the process still holds would be reused, and hide as much of the new allocations.
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR_REFS.write_text("5")
            self._base = _status("VmRSS")

    def peak(self) -> float | None:
        """Return the peak since the start, in GiB above the memory at the start, or None if it cannot be measured."""
        if self._base is None:
            return None
        high = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status("VmHWM")
        return (high - self._base) / GIB


def _status(field: str) -> int:
    """Read a field of /proc/self/status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
