"""Rates that `hf-context-parallel calibrate` measured on this machine, in the cache of the user."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..attention.kernels.registry import kernel_name
from ..distributed.user_cache import FOLDER, keep, kept
from ..planning.machine import Calibration, Machine, machine_of

RATES = FOLDER / "rates.json"
"""File with an entry for each device, version of PyTorch and kernel."""
MEASURED = ("forward", "backward", "linear", "memory", "bandwidth", "latency", "launch")
"""Fields of `Machine` that are measured."""


def machines(kernel: str) -> dict[str, Machine]:
    """Rates for tensors on the CPU and on CUDA, calibrated if this machine has been.

    The caches of ranks may differ, and ranks with different rates would choose different strategies. So one rank
    reads its own, and tells the others.

    Args:
        kernel: one of `KERNELS` of `config.py`.
    """
    found = {}
    for device in (torch.device("cpu"), torch.device("cuda")):
        name = kernel_name(kernel, device.type)
        found[device.type] = machine_of(device, 1, None, name, calibration_of(device.type, name))
    return found


def calibration_of(device_type: str, kernel: str | None) -> Calibration | None:
    """Read the rates of a device of this machine and a kernel, or None if there are none."""
    entries = {key: entry for key, entry in kept(RATES).items() if _is_valid(entry) and entry["device"] == device_type}
    if kernel is None or not entries:  # so a device is not asked for its name without need
        return None
    entry = entries.get(_key(device_type, kernel))
    return None if entry is None else Calibration(entry["rates"], entry["date"])


def keep_rates(device_type: str, by_kernel: Mapping[str, Mapping[str, float]]) -> None:
    """Keep the measured rates of a device of this machine.

    Args:
        by_kernel: for each kernel the values of fields in `MEASURED`.

    Raises:
        OSError: if the cache cannot be written.
    """
    today = date.today().isoformat()
    entries = {
        _key(device_type, kernel): {"device": device_type, "date": today, "rates": dict(rates)}
        for kernel, rates in by_kernel.items()
    }
    keep(RATES, entries)


def device_name(device_type: str) -> str:
    """Name of the device: of the GPU, or of the processor with the number of its cores."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores"


def _key(device_type: str, kernel: str) -> str:
    return f"{device_name(device_type)}, torch {torch.__version__}, {kernel}"


def processor() -> str:
    """Name of the processor on Linux; its architecture on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _is_valid(entry: Any) -> bool:
    """Return whether an entry was written by this version, as far as can be seen."""
    if not isinstance(entry, dict) or not {"device", "date", "rates"} <= entry.keys():
        return False
    rates = entry["rates"]
    return isinstance(rates, dict) and all(
        name in MEASURED and isinstance(rate, float) and 0 < rate < math.inf for name, rate in rates.items()
    )
