"""Rates of this machine as `hf-context-parallel calibrate` measures them, and the strategies chosen by them.

Nothing is written to the cache of the user.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

import hf_context_parallel as hcp
from hf_context_parallel.attention.auto_strategy import choose
from hf_context_parallel.attention.strategy import Shape
from hf_context_parallel.calibration.measure import SIZES, kernels_of, one_core, parts_of_device, parts_of_kernel
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.machine import Calibration, machine_of
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows

from .speed import DIM, HEADS, KEY_HEADS

RANKS = 8
MOST = 60
"""Seconds that a calibration may take on a GPU."""


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    sizes = SIZES[device.type]
    if device.type == "cpu":
        sizes = sizes._replace(tokens=64, side=64, numbers=2**16, seconds=0.01)
    start = time.perf_counter()
    with one_core():
        shared: dict[str, float] = {}
        for part in parts_of_device(device, sizes):
            if part.name != "messages":  # which need processes; the other items measure none either
                shared |= part.measure()
        found = {}
        for kernel in kernels_of(device, sizes):
            if kernel.name != "flash_attn_4":  # which compiles for long, and has an item of its own
                found[kernel.name] = dict(shared)
                for part in parts_of_kernel(kernel, device, sizes):
                    found[kernel.name] |= part.measure()
    took = time.perf_counter() - start
    yield {"what": "calibration", "right": device.type == "cpu" or took <= MOST, "took s": took}
    for name, rates in found.items():
        built_in = machine_of(device, RANKS, None, name)
        for field, rate in rates.items():
            yield {"what": f"{name}, {field}", "measured": rate, "built in": getattr(built_in, field)}
        for tokens in (4096, 131_072):
            for window in (None, 1024):
                yield {
                    "what": f"{name}, {tokens} tokens on {RANKS}, window {window}",
                    **both(device, name, rates, tokens, window),
                }


def both(
    device: torch.device, kernel: str, rates: dict[str, float], tokens: int, window: int | None
) -> dict[str, str]:
    """Choices of `auto` by the built-in and by the measured rates."""
    mask = Mask(tokens, whole_rows(1, tokens), Pattern(sliding_window=window))
    shape = Shape(HEADS, KEY_HEADS, DIM, DIM, torch.bfloat16)
    chosen = {}
    for name, calibration in (("before", None), ("after", Calibration(rates, "today"))):
        machine = machine_of(device, RANKS, None, kernel, calibration)
        choice = choose(hcp.ContextParallelConfig(size=RANKS), "auto", zigzag(tokens, RANKS), mask, shape, machine)
        chosen[name] = f"{choice.comm_type} of {choice.inner}, {choice.together} owners a step"
    return chosen
