"""Measurement of the rates of this machine: kernels, matrix products, memory, launches, and messages of two ranks."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing

from ..attention.kernels.base import Kernel
from ..attention.kernels.registry import KERNELS
from ..attention.scores import Scores
from ..config import ContextParallelConfig
from ..context_parallel import ContextParallel
from ..planning.machine import BACKWARD, attention_flops
from ..planning.tiles import CAUSAL, Segments


class Sizes(NamedTuple):
    """Sizes of what is measured.

    Args:
        tokens, heads, key_heads, head_dim, dtype: a causal call of attention.
        side: side of a matrix product.
        numbers: numbers of the float32 tensors that are added.
        message: bytes of a message.
        seconds: least time of each measurement.
    """

    tokens: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype
    side: int
    numbers: int
    message: int
    seconds: float


SIZES = {
    "cpu": Sizes(2048, 4, 4, 64, torch.float32, 1024, 2**24, 2**22, 1.0),
    "cuda": Sizes(16384, 32, 8, 128, torch.bfloat16, 8192, 2**28, 2**27, 0.5),
}
WARM_UP, LEAST_RUNS = 2, 5


class Part(NamedTuple):
    """One measurement: its name, and the function that returns fields of `Machine`."""

    name: str
    measure: Callable[[], dict[str, float]]


def kernels_of(device: torch.device, sizes: Sizes) -> list[Kernel]:
    """Make the kernels that this machine has for a device. The reference kernel has no rates of its own."""
    scores = Scores(sizes.head_dim**-0.5)
    found = [KERNELS[name]() for name in KERNELS if name != "reference" and KERNELS[name].missing() is None]
    wanted = device, sizes.dtype, sizes.head_dim, sizes.head_dim, scores
    return [kernel for kernel in found if kernel.refusal(*wanted) is None]


def parts_of_device(device: torch.device, sizes: Sizes) -> list[Part]:
    """Measurements that are the same for all kernels. Messages are left out if there is one GPU alone."""
    found = [
        Part("matrix products", lambda: {"linear": _linear(device, sizes)}),
        Part("memory", lambda: {"memory": _memory(device, sizes)}),
    ]
    if device.type == "cpu" or torch.cuda.device_count() > 1:
        found.append(Part("messages", lambda: _messages(device.type, sizes)))
    return found


def parts_of_kernel(kernel: Kernel, device: torch.device, sizes: Sizes) -> list[Part]:
    """Measurements of a kernel."""
    return [
        Part(f"{kernel.name}, forward and backward", lambda: _attention(kernel, device, sizes)),
        Part(f"{kernel.name}, launch", lambda: {"launch": _launch(kernel, device, sizes)}),
    ]


@contextmanager
def one_core() -> Iterator[None]:
    """Let PyTorch use one core, as the built-in rates of a CPU are for one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(run: Callable[[], object], device: torch.device, least: float) -> float:
    """Least seconds that a run takes, after those that warm up. What else runs on the machine only adds to them."""
    taken: list[float] = []
    while len(taken) < LEAST_RUNS + WARM_UP or sum(taken[WARM_UP:]) < least:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken[WARM_UP:])


def _call(device: torch.device, sizes: Sizes, tokens: int) -> tuple[list[torch.Tensor], Segments, Scores]:
    """Make query, key and value of a causal call, the call, and its scores."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [
        torch.randn(tokens, heads, sizes.head_dim, generator=generator, device=device, dtype=sizes.dtype)
        for heads in (sizes.heads, sizes.key_heads, sizes.key_heads)
    ]
    return tensors, Segments(((0, tokens),), ((0, tokens),), CAUSAL), Scores(sizes.head_dim**-0.5)


def _attention(kernel: Kernel, device: torch.device, sizes: Sizes) -> dict[str, float]:
    tokens = sizes.tokens
    tensors, segments, scores = _call(device, sizes, tokens)
    output, lse = kernel.forward(*tensors, segments, scores)
    output = output.to(sizes.dtype)
    flops = attention_flops(tokens * (tokens + 1) // 2, sizes.heads, sizes.head_dim, sizes.head_dim)
    forward = _seconds(lambda: kernel.forward(*tensors, segments, scores), device, sizes.seconds)
    backward = _seconds(
        lambda: kernel.backward(output, *tensors, output, lse, segments, scores), device, sizes.seconds
    )
    return {"forward": flops / forward, "backward": BACKWARD * flops / backward}


def _launch(kernel: Kernel, device: torch.device, sizes: Sizes) -> float:
    """Seconds that a call with hardly any work takes, if others follow it."""
    calls = 20
    tensors, segments, scores = _call(device, sizes, 16)

    def run() -> None:
        for _ in range(calls):
            kernel.forward(*tensors, segments, scores)

    return _seconds(run, device, sizes.seconds / 4) / calls


def _linear(device: torch.device, sizes: Sizes) -> float:
    a, b = (torch.ones(sizes.side, sizes.side, device=device, dtype=sizes.dtype) for _ in range(2))
    return 2.0 * sizes.side**3 / _seconds(lambda: a @ b, device, sizes.seconds)


def _memory(device: torch.device, sizes: Sizes) -> float:
    total, part = (torch.ones(sizes.numbers, device=device) for _ in range(2))
    return 3.0 * 4 * sizes.numbers / _seconds(lambda: total.add_(part), device, sizes.seconds)


def _messages(device_type: str, sizes: Sizes) -> dict[str, float]:
    """Rates of messages between two new processes, which exchange them as attention does."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_exchange, (device_type, folder, sizes.message, sizes.seconds), nprocs=2)
        rates: dict[str, float] = json.loads(Path(folder, "rates.json").read_text())
    return rates


def _exchange(rank: int, device_type: str, folder: str, message: int, least: float) -> None:
    """Measure as one of two ranks. The first one writes the rates."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in launched.items()}
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    backend, store = ("nccl" if device_type == "cuda" else "gloo"), Path(folder, "store").as_uri()
    if device_type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=2)
    exchange = ContextParallel(ContextParallelConfig(size=2)).exchange

    def seconds(count: int, runs: int) -> float:
        sent, received = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
        taken = []
        for _ in range(WARM_UP + runs):
            dist.barrier()
            start = time.perf_counter()
            exchange.post([(1 - rank, sent)], [(1 - rank, received)]).wait()
            if device_type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
        return min(taken[WARM_UP:])

    # Ranks make equally many exchanges, so their number cannot depend on the time that one of them took.
    latency = seconds(1, 50)
    bandwidth = message / max(seconds(message, max(LEAST_RUNS, round(20 * least))) - latency, 1e-9)
    if rank == 0:
        Path(folder, "rates.json").write_text(json.dumps({"bandwidth": bandwidth, "latency": latency}))
    dist.barrier()
    dist.destroy_process_group()
