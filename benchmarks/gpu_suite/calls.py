"""Comparison of kernel calls with the reference kernel in float32: outputs, LSE, and gradients given a global LSE."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from itertools import accumulate
from random import Random
from typing import Any, NamedTuple

import torch

from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.attention.kernels.registry import KERNELS
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Band, Segments

from .measure import DTYPES, errors, kernels, merged

ALL, ROW, LSE = 0.01, 0.06, 1e-3
"""Largest errors that are explained by bfloat16: of whole tensors, of a row, and of an LSE (absolute)."""


class Heads(NamedTuple):
    query: int
    key: int
    query_dim: int
    value_dim: int


HEADS = [Heads(*n, d, d) for n in ((8, 8), (32, 8), (8, 1)) for d in (64, 96, 128, 256)] + [Heads(16, 16, 192, 128)]
BANDS = {
    "full": FULL,
    "causal": CAUSAL,
    "left": Band(5, None),
    "right": Band(None, 3),
    "both": Band(7, 0),
    "wide": Band(100_000, 100_000),
}

LONG = (("long square", "causal"), ("long", "full"), ("long", "causal"))
"""Segments and bands that cuDNN computes, the last ones by two calls."""


def segments_of(name: str, small: bool) -> list[tuple[int, int]]:
    """Draw lengths of query and key ranges. No query range is longer than its keys, so each query reads a key."""
    random = Random(0)
    if name == "one":
        return [(61, 93)] if small else [(1000, 1500)]
    if name == "mixed":
        return (
            [(1, 1), (1, 40), (17, 17), (64, 100)] if small else [(1, 1), (1, 300), (129, 129), (64, 700), (517, 600)]
        )
    if name == "long square":
        return [(61, 61)] if small else [(1300, 1300)]
    if name == "long":
        return [(61, 70)] if small else [(1030, 2100)]
    if name == "single queries":
        return [(1, 50)] * 3 if small else [(1, random.randint(1, 900)) for _ in range(40)]
    lengths = [random.randint(1, 20 if small else 700) for _ in range(10 if small else 200)]
    return [(length, length) for length in lengths]


def segments(name: str, band: Band, small: bool) -> Segments:
    """Place ranges one after another, with a gap of two tokens after each."""
    lengths = segments_of(name, small)
    sides = []
    for side in zip(*lengths):
        ends = list(accumulate(length + 2 for length in side))
        sides.append(tuple((end - length - 2, end - 2) for end, length in zip(ends, side)))
    return Segments(*sides, band)


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device, small = torch.device(options.device), options.device == "cpu"
    cases = [("mixed", band, heads) for heads in HEADS for band in BANDS]
    cases += [(name, band, heads) for heads in HEADS for name, band in LONG]
    cases += [(name, band, HEADS[6]) for name in ("one", "single queries", "many") for band in BANDS]
    if small:
        cases = cases[::12]
    for kernel in kernels(device):
        if not kernel.refusal(device, DTYPES[device.type], 8, 8, Scores(1.0)):
            yield from checked(kernel, cases, device, small)


def checked(
    kernel: Kernel, cases: list[tuple[str, str, Heads]], device: torch.device, small: bool
) -> Iterator[dict[str, Any]]:
    """Compare a kernel with the reference kernel: names of segments and of bands, and heads, in each case."""
    reference = KERNELS["reference"]()
    worst: dict[str, tuple[float, Any]] = {}
    failed = []
    for name, band, heads in cases:
        if kernel.refusal(device, DTYPES[device.type], heads.query_dim, heads.value_dim, Scores(1.0)):
            continue
        call = segments(name, BANDS[band], small)
        found = compare(kernel, reference, call, heads, device)
        case = f"{name}, {band}, {tuple(heads)}"
        for what, error in found.items():
            if not error <= worst.get(what, (-1.0,))[0]:
                worst[what] = error, case
            limit = LSE if what == "lse" else ROW if what.endswith("row") else ALL
            if not error <= limit:  # so that a NaN counts as a failure
                failed.append({"what": f"{kernel.name}, {case}", "right": False, what: error})
    yield from failed
    for what, (error, case) in worst.items():
        yield {"what": f"{kernel.name}, worst {what}", "error": error, "case": case, "cases": len(cases)}
    yield {"what": f"{kernel.name}, all cases", "right": not failed, "failed": len(failed)}
    yield determinism(kernel, segments("mixed", CAUSAL, small), device)


def compare(kernel: Kernel, reference: Kernel, call: Segments, heads: Heads, device: torch.device) -> dict[str, float]:
    """Measure the errors of output, LSE and gradients of one call. Backward gets an LSE over further keys too."""
    query, key, value, other_key, other_value, grad = _tensors(call, heads, device)
    scores = Scores(heads.query_dim**-0.5)
    exact = [tensor.float() for tensor in (query, key, value)]
    expected, expected_lse = reference.forward(*exact, call, scores)
    output, lse = kernel.forward(query, key, value, call, scores)
    found = {f"output {k}": v for k, v in errors(output, expected).items()}
    found["lse"] = (lse.float() - expected_lse).abs().max().item()
    every = Segments(call.queries, tuple((0, 50) for _ in call.keys))
    other = reference.forward(exact[0], other_key.float(), other_value.float(), every, scores)
    whole, whole_lse = merged(call, len(query), (expected, expected_lse), other)
    gradients = kernel.backward(grad, query, key, value, whole.to(query.dtype), whole_lse, call, scores)
    rounded = whole.to(query.dtype).float()  # as the kernel gets it
    truth = reference.backward(grad.float(), *exact, rounded, whole_lse, call, scores)
    for what, got, want in zip(("dq", "dk", "dv"), gradients, truth):
        found |= {f"{what} {k}": v for k, v in errors(got, want).items()}
    return found


def determinism(kernel: Kernel, call: Segments, device: torch.device) -> dict[str, Any]:
    """Check that `deterministic=True` gives the same bits twice."""
    query, key, value, *_, grad = _tensors(call, HEADS[6], device)
    scores = Scores(128**-0.5, deterministic=True)
    whole, lse = merged(call, len(query), kernel.forward(query, key, value, call, scores))
    runs = [kernel.backward(grad, query, key, value, whole.to(query.dtype), lse, call, scores) for _ in range(3)]
    same = all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again))
    return {"what": f"{kernel.name}, deterministic", "right": same}


def _tensors(call: Segments, heads: Heads, device: torch.device) -> list[torch.Tensor]:
    """Make query, key, value, further keys/values, and the output's gradient. Keys/values are views of a buffer."""
    torch.manual_seed(0)
    tokens, keys = call.queries[-1][1] + 2, call.keys[-1][1] + 2

    def packed(rows: int) -> list[torch.Tensor]:
        both = torch.randn(
            rows, heads.key, heads.query_dim + heads.value_dim, device=device, dtype=DTYPES[device.type]
        )
        return [both[..., : heads.query_dim], both[..., heads.query_dim :]]

    query = torch.randn(tokens, heads.query, heads.query_dim, device=device, dtype=DTYPES[device.type])
    grad = torch.randn(tokens, heads.query, heads.value_dim, device=device, dtype=DTYPES[device.type])
    return [query, *packed(keys), *packed(50), grad]
