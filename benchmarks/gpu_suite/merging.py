"""Combination of rows as the device does it, with Triton on CUDA: its results against float32, and its speed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from hf_context_parallel.attention import merge
from hf_context_parallel.attention.totals import combining
from hf_context_parallel.distributed.rows import Rows

from .measure import errors, measure, median_ms

HEADS, DIM = 32, 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LSE, ROW = 1e-5, 2e-6
"""Largest errors in float32: of an LSE (absolute), and of a row. A row of fewer bits may have half of its epsilon."""


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device, small = torch.device(options.device), options.device == "cpu"
    for dtype in DTYPES:
        for kept in dict.fromkeys((dtype, torch.float32)):
            for scattered in (False, True):
                yield exact(64 if small else 4096, dtype, kept, scattered, device)
    for dtype in DTYPES:
        yield speed(64 if small else 16_384, dtype, device)


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exact(tokens: int, dtype: torch.dtype, kept: torch.dtype, scattered: bool, device: torch.device) -> dict[str, Any]:
    """Merge and add rows of `dtype` into a total of dtype `kept`, and compare with `merge.py` in float32.

    Half of the rows of the total are touched. Some have read no key, in the total, in the part or in both.
    """
    torch.manual_seed(0)
    parts = tokens // 2
    output, part = (torch.randn(rows, HEADS, DIM, device=device) for rows in (tokens, parts))
    output, part = output.to(kept), part.to(dtype)
    lse, part_lse = torch.randn(tokens, HEADS, device=device), torch.randn(HEADS, parts, device=device).T
    lse[::3], part_lse[::5] = float("-inf"), float("-inf")
    rows = Rows(torch.randperm(tokens)[:parts]) if scattered else Rows.of_runs([(tokens - parts, tokens)])
    of_part = Rows(torch.randperm(parts)) if scattered else Rows.of_runs([(0, parts)])
    how, found, right = combining(part), {}, True
    for name in ("merge_rows", "add_rows"):
        mine, mine_lse, truth, true_lse = output.clone(), lse.clone(), output.float(), lse.clone()
        logs = ((mine_lse, part_lse), (true_lse, part_lse)) if name == "merge_rows" else ((), ())
        getattr(how, name)(mine, part, mine, *logs[0], rows, of_part)
        getattr(merge, name)(truth, part.float(), truth, *logs[1], rows, of_part)
        found[f"{name} row"] = errors(mine, truth)["row"]
        right &= found[f"{name} row"] <= max(torch.finfo(kept).eps / 2, ROW)  # which is False for a NaN
        none = true_lse == float("-inf")
        found[f"{name} lse"] = (mine_lse - true_lse).masked_fill(none, 0.0).abs().max().item()
        right &= found[f"{name} lse"] <= LSE and torch.equal(mine_lse == float("-inf"), none)
    where = "scattered rows" if scattered else "a run"
    return {"what": f"{named(dtype)} into {named(kept)}, {where}, {module(how)}", "right": bool(right), **found}


def speed(tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Time the merging of two parts, by one kernel and by operators of PyTorch, beside a copy of the same bytes."""
    output, part = (torch.randn(tokens, HEADS, DIM, device=device).to(dtype) for _ in range(2))
    lse, part_lse = torch.randn(tokens, HEADS, device=device), torch.randn(HEADS, tokens, device=device).T
    rows, how = Rows.of_runs([(0, tokens)]), combining(part)

    def merged_by(way: Any) -> dict[str, float]:
        return measure(lambda: way.merge_rows(output, part, output, lse, part_lse, rows, rows), device)

    mine, unfused = merged_by(how), merged_by(merge)
    moved = 3 * part.numel() * part.itemsize + 3 * lse.numel() * lse.itemsize  # two are read, one is written
    flat = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    other = torch.empty_like(flat)
    return {
        "what": f"merging {tokens} rows of {named(dtype)}, {module(how)}",
        **mine,
        "GB/s": moved / mine["ms"] / 1e6,
        "of a copy of the same bytes": mine["ms"] / median_ms(lambda: other.copy_(flat), device),
        "of operators of PyTorch": mine["ms"] / unfused["ms"],
    }


def module(way: Any) -> str:
    return way.__name__.rpartition(".")[2]
