"""Combination of rows of two tensors: sums, and outputs of attention merged by log-sum-exp (LSE)."""

from __future__ import annotations

import torch

from ..distributed.messages import accumulation_dtype
from ..distributed.rows import Rows, cut, in_common


def add_rows(source: torch.Tensor, part: torch.Tensor, target: torch.Tensor, rows: Rows, of_part: Rows) -> None:
    """Write `source[rows] + part[of_part]` to `target[rows]`, rounded once.

    Args:
        source, target: `[T, ...]`. They may be the same tensor.
        part: `[P, ...]`.
    """
    common = in_common(part, of_part, target, rows)
    if common is None:
        target.index_copy_(0, rows.index(target.device), _sum(rows.of(source), of_part.of(part)).to(target.dtype))
        return
    for here, there in common:
        left, right, result = cut(source, there), cut(part, here), cut(target, there)
        if source.dtype == target.dtype:
            torch.add(left, right, out=result)
        else:
            result.copy_(_sum(left, right))


def _sum(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.to(accumulation_dtype(left.dtype)) + right


def merge_rows(
    source: torch.Tensor,
    part: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    part_lse: torch.Tensor,
    rows: Rows,
    of_part: Rows,
) -> None:
    """Merge `source[rows]` with `part[of_part]` into `target[rows]`, and their LSE into `lse[rows]`.

    With L = log(exp(lse) + exp(part_lse)), the output over both sets of keys is their mean with weights exp(lse - L)
    and exp(part_lse - L) (Milakov and Gimelshein, 2018, arXiv:1805.02867). A row with an LSE of -inf has read no key.

    Args:
        source, target: `[T, H, D]`. They may be the same tensor.
        part: `[P, H, D]`.
        lse, part_lse: `[T, H]` in the accumulation dtype, and `[P, H]`.
    """
    common = in_common(part, of_part, target, rows)
    if common is None:
        merged, weight = _weight(rows.of(lse), of_part.of(part_lse))
        index = rows.index(target.device)
        target.index_copy_(0, index, _mean(rows.of(source), of_part.of(part), weight).to(target.dtype))
        lse.index_copy_(0, index, merged)
        return
    for here, there in common:
        lse_there = cut(lse, there)
        merged, weight = _weight(lse_there, cut(part_lse, here))
        left, right, result = cut(source, there), cut(part, here), cut(target, there)
        if source.dtype == part.dtype == target.dtype == weight.dtype:
            torch.lerp(left, right, weight, out=result)
        else:
            result.copy_(_mean(left, right, weight))
        lse_there.copy_(merged)


def _weight(lse: torch.Tensor, part_lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the merged LSE `[R, H]`, and the weight of the part `[R, H, 1]`, which is 0 if no key was read."""
    merged = torch.logaddexp(lse, part_lse.to(lse.dtype))
    least = torch.finfo(merged.dtype).min  # -inf less itself would be NaN
    weight = (part_lse - merged.clamp_min(least)).exp_()
    return merged, weight.unsqueeze(-1)


def _mean(output: torch.Tensor, part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.lerp(output.to(weight.dtype), part.to(weight.dtype), weight)
