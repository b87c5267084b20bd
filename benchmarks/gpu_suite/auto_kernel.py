"""Policy of `kernel="auto"` with cuDNN, which compiles for a length when that has paid, beside stock attention.

One causal call is repeated until cuDNN has compiled for it, forward and backward.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_context_parallel.attention.kernels.cudnn import PAYS
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.planning.machine import attention_flops
from hf_context_parallel.planning.tiles import CAUSAL, Segments

from .speed import DIM, HEADS, call_of, tensors

CHUNK = 20
"""Turns that are timed together."""
OF_STOCK = 1.05
"""Largest time after cuDNN has compiled, as a multiple of that of stock attention."""


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device, small = torch.device(options.device), options.device == "cpu"
    tokens, kernel = 64 if small else 16_384, choose_kernel("auto", device.type)
    segments = Segments(((0, tokens),), ((0, tokens),), CAUSAL)
    work = attention_flops(segments.pairs, HEADS, DIM, DIM)
    chunks = 2 if small else 3 + int(PAYS / work / CHUNK)
    call = call_of(kernel, segments, device)

    def ours() -> None:
        call.forward()
        call.backward()

    mine, other = chunk_ms(ours, chunks, device), chunk_ms(stock(tokens, device), 2, device)
    ratio = min(mine[-2:]) / min(other)
    yield {
        "what": f"auto is {kernel.name}, a call of {tokens} after {CHUNK * chunks} calls",
        "right": small or ratio <= OF_STOCK,
        "of stock attention": ratio,
        "ms": min(mine[-2:]),
        "stock ms": min(other),
        "first ms": mine[0],
        "s": sum(mine) * CHUNK / 1000,
        "stock s": min(other) * CHUNK * chunks / 1000,
    }


def stock(tokens: int, device: torch.device) -> Callable[[], Any]:
    """Make a causal call of PyTorch's attention, forward and backward."""
    *inputs, grad = (tensor.transpose(0, 1)[None] for tensor in tensors(tokens, device))
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def both() -> None:
        output = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        torch.autograd.grad(output, inputs, grad)

    return both


def chunk_ms(call: Callable[[], Any], chunks: int, device: torch.device) -> list[float]:
    """Milliseconds of a call, for each chunk of calls."""
    found = []
    for _ in range(chunks):
        start = time.perf_counter()
        for _ in range(CHUNK):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - start) / CHUNK)
    return found
