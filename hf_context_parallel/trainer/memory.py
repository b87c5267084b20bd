"""The most memory that a stretch of work needed above what was in use when it began."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIB = 2**30


class PeakMemory:
    """Measures one process: a CUDA device by PyTorch's allocator, a CPU by the kernel's count of resident pages.

    Linux keeps the high-water mark of a process and resets it on request. Where it does not, nothing is measured.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._base: int | None = None

    def start(self) -> None:
        """Begin a stretch."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        elif os.access(CLEAR_REFS, os.W_OK):
            # Memory that was freed but is still the process's would hide as much of what the stretch allocates.
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR_REFS.write_text("5")
            self._base = _status("VmRSS")

    def peak(self) -> float | None:
        """GiB above the start at most, so far; None where it cannot be measured."""
        if self._base is None:
            return None
        high = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status("VmHWM")
        return (high - self._base) / GIB


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
