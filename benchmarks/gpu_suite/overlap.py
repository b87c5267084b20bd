"""Profile of a ring: kernels run while messages are copied, and no call of the host waits for the device.

The profile is kept as `ring.json.gz`, for Perfetto or chrome://tracing.
"""

from __future__ import annotations

import gzip
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hf_context_parallel.planning.intervals import intersection, total, union
from hf_context_parallel.planning.mask import Mask, whole_rows

from .measure import kernels
from .rings import Layer, chosen, work_of

RANKS = 8
SHOWN = 0.01
"""Largest share of the time of a layer in which messages are copied and no kernel runs."""
LARGEST = 16 * 2**20
"""Most bytes of the profile."""
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree")
"""Calls of the CUDA runtime in which the host waits for the device."""


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    kernel = kernels(device)[0]
    length = RANKS * (16_384 if cuda else 64)
    mask = Mask(length, whole_rows(1, length))
    layer = Layer(mask, "one document", "p2p", RANKS, rank=0, together=chosen(mask, RANKS, kernel, device))
    path = options.output / "ring.json.gz"
    profiled(work_of(layer, kernel, device).both, cuda, path)
    size = path.stat().st_size
    yield {"what": f"profile of {kernel.name}, {layer}", "right": size <= LARGEST, "bytes": size}
    events = read(path)
    if cuda:
        yield {"what": "copies beside kernels", **overlap(events)}
    yield {"what": "calls that wait for the device", **waiting(events)}


def profiled(layer: Callable[[], Any], cuda: bool, path: Path) -> None:
    """Write the profile of one run of a layer to `path`."""
    for _ in range(2):
        layer()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        with record_function("layer"):
            layer()
        if cuda:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


def read(path: Path) -> list[dict[str, Any]]:
    """Read the events of a profile that have a duration. Times are in microseconds."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if "dur" in event and "cat" in event]


def overlap(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of the time of the layer in which messages are copied and no kernel runs.

    Messages are the copies on a stream without kernels. On one device they need its multiprocessors, which a kernel
    may hold to its end. So they run at the edges of kernels, and what counts is that kernels do not wait for them.
    """

    def intervals(chosen: list[dict[str, Any]]) -> list[tuple[int, int]]:
        return union((round(1000 * e["ts"]), round(1000 * (e["ts"] + e["dur"]))) for e in chosen)  # in nanoseconds

    of_kernels = [event for event in events if event["cat"] == "kernel"]
    busy = {event["args"]["stream"] for event in of_kernels}
    copies = [event for event in events if event["cat"] == "gpu_memcpy" and event["args"]["stream"] not in busy]
    messages, computing = intervals(copies), intervals(of_kernels)
    whole = computing[-1][1] - computing[0][0]
    shown = (total(messages) - total(intersection(messages, computing))) / whole
    found = {"shown": shown, "of the copies": shown * whole / max(1, total(messages)), "copies": len(copies)}
    return {"right": bool(copies) and shown <= SHOWN, **found, "idle": 1 - total(computing) / whole}


def waiting(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Calls that make the host wait while it queues the layer."""
    whole = next(event for event in events if event["cat"] == "user_annotation" and event["name"] == "layer")
    start, end = whole["ts"], whole["ts"] + whole["dur"]
    names = [event["name"] for event in events if event["cat"] == "cuda_runtime" and start <= event["ts"] < end]
    found = sorted({name for name in names if name in WAITS})
    return {"right": not found, "found": found, "calls of the runtime": len(names)}
