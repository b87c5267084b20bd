"""Merging of attention over some keys with attention over other keys, by log-sum-exp (LSE)."""

from __future__ import annotations

import torch

from ..planning.intervals import Interval


def begin(
    tokens: int,
    runs: tuple[Interval, ...],
    part_output: torch.Tensor,
    part_lse: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of `tokens` rows in `dtype`, made of a first part.

    If the part has all rows, it is the output itself. Rows that it does not have are 0, with an LSE of -inf.
    """
    if runs == ((0, tokens),):
        return part_output.to(dtype), part_lse.to(dtype)
    output = part_output.new_zeros(tokens, *part_output.shape[1:], dtype=dtype)
    lse = part_lse.new_full((tokens, *part_lse.shape[1:]), float("-inf"), dtype=dtype)
    merge_(output, lse, runs, part_output, part_lse)
    return output, lse


def merge_(
    output: torch.Tensor,
    lse: torch.Tensor,
    runs: tuple[Interval, ...],
    part_output: torch.Tensor,
    part_lse: torch.Tensor,
) -> None:
    """Merge a part into `output` and `lse`, in place.

    With L = log(exp(lse) + exp(part_lse)), the output over both sets of keys is their mean with weights exp(lse - L)
    and exp(part_lse - L) (Milakov and Gimelshein, 2018, arXiv:1805.02867).

    Args:
        output, lse: `[T, H, D]` and `[T, H]`, in the accumulation dtype. Rows that have read no key yet are 0 and
            -inf.
        runs: the rows of `output` that the part holds, in order.
        part_output, part_lse: `[total of runs, H, D]` and `[total of runs, H]`. Every row has read a key.
    """
    offset = 0
    for start, stop in runs:
        part = slice(offset, offset + stop - start)
        offset = part.stop
        merged = torch.logaddexp(lse[start:stop], part_lse[part])
        weight = (part_lse[part] - merged).exp_()
        output[start:stop].lerp_(part_output[part].to(output.dtype), weight.unsqueeze(-1))
        lse[start:stop] = merged
