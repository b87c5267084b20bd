"""Memory of a layer at the peak of its backward, compared with the estimate by which `auto` decides what fits."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from hf_context_parallel.attention.auto_strategy import counts_of, shares
from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.attention.strategy import Shape
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.machine import machine_of
from hf_context_parallel.planning.mask import Mask, whole_rows

from .measure import DTYPES, kernels
from .rings import Layer, chosen, work_of
from .speed import DIM, HEADS, KEY_HEADS

RANKS = 8
APART = 0.1
"""Largest difference, as a fraction of the estimate."""


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    for kernel in kernels(device):
        for length in (1024,) if device.type == "cpu" else (65_536, 131_072):
            mask = Mask(length, whole_rows(1, length))
            for comm_type in ("p2p", "all_gather"):
                together = chosen(mask, RANKS, kernel, device) if comm_type == "p2p" else 1
                for groups in (1, 4):
                    layer = Layer(mask, "one document", comm_type, RANKS, together=together, groups=groups)
                    yield peak(layer, kernel, device)


def peak(layer: Layer, kernel: Kernel, device: torch.device) -> dict[str, Any]:
    """Measure the rank that needs most by the estimate."""
    shape = Shape(HEADS, KEY_HEADS, DIM, DIM, DTYPES[device.type])
    layout, machine = zigzag(layer.mask.length, RANKS), machine_of(device, RANKS, None, kernel.name)
    found = shares(
        layer.comm_type, 1, layout, counts_of(layout, layer.mask), shape, machine, layer.together, layer.groups
    )
    estimates = [share.peak for share in found]
    rank = estimates.index(max(estimates))
    layer = replace(layer, rank=rank)
    result = {"what": f"{kernel.name}, {layer}", "estimated MiB": estimates[rank] / 2**20}
    work = work_of(layer, kernel, device)
    work.both()  # so that what is kept for later layers is there
    if device.type == "cpu":  # whose allocator counts no bytes
        return result
    output = work.forward()
    keys = layer.tokens * KEY_HEADS * 2 * DIM * output.itemsize  # of this rank, which the estimate counts
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - keys
    work.backward(output)
    needed = torch.cuda.max_memory_allocated() - before
    ratio = needed / estimates[rank]
    return {**result, "MiB": needed / 2**20, "of the estimate": ratio, "right": abs(ratio - 1) <= APART}
