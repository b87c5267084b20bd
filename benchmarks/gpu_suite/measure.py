"""Measurement of times and errors, for all items."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.attention.kernels.registry import KERNELS
from hf_context_parallel.attention.totals import Output, Places
from hf_context_parallel.planning.portions import portions_of
from hf_context_parallel.planning.tiles import Segments

WARM_UP = 2
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
"""Dtype of the computation on each device. Many CPUs have no arithmetic in bfloat16."""


def kernels(device: torch.device) -> list[Kernel]:
    """Make the kernels of a device that are there, but the reference and those that have an item of their own."""
    left_out = ("reference", "flash_attn_4") if device.type == "cpu" else ("reference", "flash_attn_4", "cpu")
    return [kernel() for name, kernel in KERNELS.items() if name not in left_out and not kernel.missing()]


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median milliseconds of `run` on the device. Host time is included if the device waits for the host."""
    return measure(run, device, repeats)["ms"]


def measure(run: Callable[[], Any], device: torch.device, repeats: int = 7) -> dict[str, float]:
    """Measure medians over `repeats` runs, after a warm-up.

    Returns:
        `ms`, from the first kernel to the last; `host ms`, until `run` returned; `peak MiB`, the memory that `run`
        allocated in addition. On a CPU, whose times nobody reads, `run` is called once. The first two are the same
        there, and the last is absent.
    """
    cuda = device.type == "cuda"
    warm_up, repeats = (WARM_UP, repeats) if cuda else (0, 1)
    taken, host = [], []
    for turn in range(warm_up + repeats):
        if cuda:
            torch.cuda.synchronize()
            if turn == warm_up:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        begun = time.perf_counter()
        result = run()
        host.append(1000 * (time.perf_counter() - begun))
        del result
        if cuda:
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            taken.append(host[-1])
    found = {"ms": median(taken[warm_up:]), "host ms": median(host[warm_up:])}
    if cuda:
        found["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def kernel_ms(run: Callable[[], Any]) -> float:
    """Sum of the milliseconds of all kernels in one `run` on a CUDA device, also of overlapping ones."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1000


def errors(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Relative errors of `found` against `expected`, both `[rows, ...]`.

    Returns:
        `all`, the norm of the difference over the norm of `expected`; `row`, the same ratio of the worst row. The norm
        of a row counts as at least a tenth of the mean norm.
    """
    found, expected = (tensor.detach().double().flatten(1) for tensor in (found, expected))
    difference, norm = (found - expected).norm(dim=1), expected.norm(dim=1)
    floor = norm.square().mean().sqrt() / 10 + 1e-30
    return {
        "all": (difference.norm() / (norm.norm() + 1e-30)).item(),
        "row": (difference / norm.clamp_min(floor)).max().item(),
    }


def merged(call: Segments, rows: int, *parts: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge outputs and LSE of the queries of a call over different keys, as the ring does."""
    output = Output(Places(portions_of([call.query_runs] * len(parts), rows)))
    for number, part in enumerate(parts):
        output.add(number, *part)
    assert output.value is not None  # there is a part
    return output.value
