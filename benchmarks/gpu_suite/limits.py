"""Calls so large that indices pass 32 bits, before which kernels cut them by heads.

Gradients of the last rows are compared with those of a short call.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.tiles import Band, Segments

from .measure import errors, kernels

HEADS, KEY_HEADS, DIM, WINDOW = 32, 4, 128, 1024
LAST = 512
"""Rows that are compared; they read `WINDOW` keys each."""
ALL = 0.01


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    if options.device != "cuda":
        return
    for kernel in kernels(torch.device(options.device)):
        for tokens in (524_160, 524_288, 524_416, 655_360):
            for parts in (1, 2):
                try:
                    yield last_rows(kernel, tokens, parts)
                except Exception as error:  # after an illegal access no more kernels can run in this process
                    yield {"what": _named(kernel, tokens, parts), "right": False, "error": str(error)[:300]}
                    return


def _named(kernel, tokens: int, parts: int) -> str:
    return f"{kernel.name}, {tokens} tokens x {HEADS} heads x {DIM}, {parts} segments"


def last_rows(kernel, tokens: int, parts: int) -> dict[str, Any]:
    torch.manual_seed(0)
    shapes = [(tokens, n, DIM) for n in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    query, key, value, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    edges = [tokens * part // parts for part in range(parts + 1)]
    ranges = tuple(zip(edges, edges[1:]))
    scores, band = Scores(DIM**-0.5), Band(WINDOW - 1, 0)
    segments = Segments(ranges, ranges, band)
    output, lse = kernel.forward(query, key, value, segments, scores)
    found = kernel.backward(grad, query, key, value, output, lse, segments, scores)
    torch.cuda.synchronize()
    short = [tensor[-LAST - WINDOW :] for tensor in (query, key, value, grad)]
    alone = Segments(((0, LAST + WINDOW),), ((0, LAST + WINDOW),), band)
    short_output, short_lse = kernel.forward(*short[:3], alone, scores)
    expected = kernel.backward(short[3], *short[:3], short_output, short_lse, alone, scores)
    by_tensor = {"output": (output, short_output), **dict(zip(("dq", "dk", "dv"), zip(found, expected)))}
    apart = {name: errors(got[-LAST:], want[-LAST:])["all"] for name, (got, want) in by_tensor.items()}
    return {"what": _named(kernel, tokens, parts), "right": all(error <= ALL for error in apart.values()), **apart}
