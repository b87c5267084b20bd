"""Command `hf-context-parallel calibrate`."""

from __future__ import annotations

import sys

import torch
from tabulate import tabulate
from tqdm import tqdm

from ..planning.machine import Machine, machine_of
from .measure import SIZES, Part, Sizes, kernels_of, one_core, parts_of_device, parts_of_kernel
from .rates import MEASURED, RATES, device_name, keep_rates

UNITS = {
    "forward": ("forward, TFLOP/s", 1e-12),
    "backward": ("backward, TFLOP/s", 1e-12),
    "linear": ("matrix products, TFLOP/s", 1e-12),
    "memory": ("memory, GB/s", 1e-9),
    "bandwidth": ("messages, GB/s", 1e-9),
    "latency": ("a message, µs", 1e6),
    "launch": ("a launch, µs", 1e6),
}
"""Name and unit of each rate in the table."""


def run_calibrate(device_type: str | None, sizes: Sizes | None = None) -> int:
    """Measure the rates of this machine, print them and keep them. Return the exit status.

    Args:
        device_type: `"cpu"` or `"cuda"`; None takes CUDA where PyTorch sees a device.
        sizes: sizes of what is measured; those of `SIZES` unless given.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type not in SIZES:
        return _mistake(f"--device={device_type!r} is not one of {', '.join(SIZES)}. Give one of them.")
    if device_type == "cuda" and not torch.cuda.is_available():
        return _mistake("--device='cuda': PyTorch sees no CUDA device. Give --device=cpu.")
    device, sizes = torch.device(device_type), sizes or SIZES[device_type]
    kernels = kernels_of(device, sizes)
    shared = parts_of_device(device, sizes)
    own = {kernel.name: parts_of_kernel(kernel, device, sizes) for kernel in kernels}
    with one_core(), tqdm(total=len(shared) + sum(map(len, own.values())), unit="part") as progress:
        common = _measured(shared, progress)
        found = {name: {**common, **_measured(parts, progress)} for name, parts in own.items()}
    print(f"{device_name(device_type)}, torch {torch.__version__}\n\n{_table(device, found)}\n")
    if "bandwidth" not in common:
        print("Messages were not measured, since PyTorch sees one GPU alone. Their rates remain the built-in ones.")
    try:
        keep_rates(device_type, found)
    except OSError as error:
        return _mistake(f"the rates cannot be kept: {error}. Set HF_HOME to a folder that can be written.")
    print(f'Kept in {RATES}. From now on comm_type="auto" estimates by them on this machine.')
    return 0


def _measured(parts: list[Part], progress: tqdm) -> dict[str, float]:
    rates: dict[str, float] = {}
    for part in parts:
        progress.set_postfix_str(part.name)
        rates |= part.measure()
        progress.update()
    return rates


def _table(device: torch.device, found: dict[str, dict[str, float]]) -> str:
    """Format a table with the measured and the built-in rates of each kernel."""
    rows = []
    for kernel, rates in found.items():
        built_in: Machine = machine_of(device, 1, kernel=kernel)
        for field in MEASURED:
            if field in rates:
                name, unit = UNITS[field]
                rows.append((kernel, name, f"{rates[field] * unit:.3g}", f"{getattr(built_in, field) * unit:.3g}"))
    return tabulate(rows, ["kernel", "rate", "measured", "built-in"], disable_numparse=True)


def _mistake(message: str) -> int:
    print(message, file=sys.stderr)
    return 1
