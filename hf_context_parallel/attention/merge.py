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
        right, result = cut(part, here), cut(target, there)
        left = result if source is target else cut(source, there)
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
        mine, index = rows.of(lse), rows.index(target.device)
        weight = _merge_lse(mine, of_part.of(part_lse))
        target.index_copy_(0, index, _mean(rows.of(source), of_part.of(part), weight).to(target.dtype))
        lse.index_copy_(0, index, mine)
        return
    for here, there in common:
        weight = _merge_lse(cut(lse, there), cut(part_lse, here))
        right, result = cut(part, here), cut(target, there)
        left = result if source is target else cut(source, there)
        if source.dtype == part.dtype == target.dtype == weight.dtype:
            torch.lerp(left, right, weight, out=result)
        else:
            result.copy_(_mean(left, right, weight))


def _merge_lse(lse: torch.Tensor, part_lse: torch.Tensor) -> torch.Tensor:
    """Merge the LSE of a part into `lse`, both `[R, H]`.

    Returns:
        The weight of the part, `[R, H, 1]`: exp(part_lse - L), which is 0 if no key was read.
    """
    least = torch.finfo(lse.dtype).min  # -inf less itself would be NaN
    weight = torch.sub(part_lse, lse.clamp_min(least)).sigmoid_()
    torch.logaddexp(lse, part_lse, out=lse)
    return weight.unsqueeze(-1)


def _mean(output: torch.Tensor, part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.lerp(output.to(weight.dtype), part.to(weight.dtype), weight)
