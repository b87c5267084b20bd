"""Calls so large that indices pass 32 bits, before which kernels cut them by heads.

With a window, any rows can be compared with those of a short call around them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.tiles import Band, Segments

from .measure import DTYPES, errors, kernels

HEADS, KEY_HEADS, DIM, WINDOW = 32, 4, 128, 1024
ALL = 0.01


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    lengths, window = ((300,), 16) if device.type == "cpu" else ((524_160, 524_288, 524_416, 655_360), WINDOW)
    for kernel in (kernel for kernel in kernels(device) if kernel.name != "cudnn"):  # which leaves windows to others
        for tokens in lengths:
            for parts in (1, 2):
                try:
                    yield exact(kernel, tokens, parts, device, window)
                except Exception as error:  # after an illegal access no more kernels can run in this process
                    yield {"what": _named(kernel, tokens, parts), "right": False, "error": str(error)[:300]}
                    return


def _named(kernel: Kernel, tokens: int, parts: int) -> str:
    return f"{kernel.name}, {tokens} tokens x {HEADS} heads x {DIM}, {parts} segments"


def exact(kernel: Kernel, tokens: int, parts: int, device: torch.device, window: int = WINDOW) -> dict[str, Any]:
    """Compare rows at the beginning, at the end and between with those of short calls, half a window at a time."""
    torch.manual_seed(0)
    shapes = [(tokens, n, DIM) for n in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    query, key, value, grad = (torch.randn(shape, device=device, dtype=DTYPES[device.type]) for shape in shapes)
    edges = [tokens * part // parts for part in range(parts + 1)]
    ranges = tuple(zip(edges, edges[1:]))
    scores, band = Scores(DIM**-0.5), Band(window - 1, 0)
    segments = Segments(ranges, ranges, band)
    output, lse = kernel.forward(query, key, value, segments, scores)
    found = kernel.backward(grad, query, key, value, output, lse, segments, scores)
    worst = dict.fromkeys(("output", "dq", "dk", "dv"), 0.0)
    length = window // 2 + 2 * (window - 1)  # keys before the compared rows, and queries after them
    alone = Segments(((0, length),), ((0, length),), band)
    for start in (0, (tokens - length) // 4, 3 * (tokens - length) // 4, tokens - length):
        short = [tensor[start : start + length] for tensor in (query, key, value, grad)]
        short_output, short_lse = kernel.forward(*short[:3], alone, scores)
        expected = short_output, *kernel.backward(short[3], *short[:3], short_output, short_lse, alone, scores)
        first = 0 if start == 0 else window - 1
        last = length if start == tokens - length else length - window + 1
        for name, got, want in zip(worst, (output, *found), expected):
            worst[name] = max(worst[name], errors(got[start + first : start + last], want[first:last])["all"])
    return {"what": _named(kernel, tokens, parts), "right": all(error <= ALL for error in worst.values()), **worst}
