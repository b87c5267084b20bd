"""Checks that forward and backward of a layer never make the host wait for the device."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from hf_context_parallel.attention.kernels.base import Kernel

from .measure import kernels
from .races import RANKS, WAYS, masks
from .rings import Layer, work_of


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    for kernel in kernels(device):
        for name, mask in masks(8192 if device.type == "cuda" else 256).items():
            for comm_type, inner in WAYS.items():
                yield no_waiting(Layer(mask, name, comm_type, RANKS, inner, rank=1), kernel, device)


def no_waiting(layer: Layer, kernel: Kernel, device: torch.device) -> dict[str, Any]:
    """Run a layer twice, the second time with an error where the host waits."""
    work = work_of(layer, kernel, device)
    what = f"{kernel.name}, {layer}"
    work.both()
    if device.type == "cpu":
        return {"what": what}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work.both()
    except RuntimeError as error:
        return {"what": what, "right": False, "error": str(error)[:300]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"what": what, "right": True}
