"""Fused combination of rows on CUDA: one Triton kernel reads both addends once, and writes the result once.

It computes what `merge.py` computes by several operators of PyTorch. On the CPU Triton's interpreter can run it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..distributed.rows import Rows

BLOCK = 4096
"""Elements that one program of the kernel combines."""


def add_rows(source: torch.Tensor, part: torch.Tensor, target: torch.Tensor, rows: Rows, of_part: Rows) -> None:
    """Compute `merge.add_rows` for tensors `[T, H, D]`."""
    _run(source, part, target, None, None, rows, of_part)


def merge_rows(
    source: torch.Tensor,
    part: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    part_lse: torch.Tensor,
    rows: Rows,
    of_part: Rows,
) -> None:
    """Compute `merge.merge_rows`."""
    _run(source, part, target, lse, part_lse, rows, of_part)


def _run(
    source: torch.Tensor,
    part: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor | None,
    part_lse: torch.Tensor | None,
    rows: Rows,
    of_part: Rows,
) -> None:
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (source, part)]
    assert target.stride(-1) == 1  # totals are allocated by rows
    heads, dim = part.shape[1:]
    width = triton.next_power_of_2(dim)
    height = min(triton.next_power_of_2(heads), max(1, BLOCK // width))
    (first, index), (first_of_part, index_of_part) = (_place(places, part.device) for places in (rows, of_part))
    logs = [x if x is None else (x, *x.stride()) for x in (lse, part_lse)]
    _combine[len(rows), triton.cdiv(heads, height)](
        *(argument for x in (*tensors, target) for argument in (x, *x.stride()[:2])),
        *(argument for x in logs for argument in (x or (None, 0, 0))),
        index,
        index_of_part,
        first,
        first_of_part,
        heads,
        dim,
        MERGES=lse is not None,
        HEIGHT=height,
        WIDTH=width,
    )


def _place(rows: Rows, device: torch.device) -> tuple[int, torch.Tensor | None]:
    """First row of a single run, or an index of the rows."""
    run = rows.run
    return (0, rows.index(device)) if run is None else (run.start, None)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]  # since Triton compiles annotations, and knows none but its own
    source,
    source_row,
    source_head,
    part,
    part_row,
    part_head,
    target,
    target_row,
    target_head,
    lse,
    lse_row,
    lse_head,
    part_lse,
    part_lse_row,
    part_lse_head,
    index,
    index_of_part,
    first,
    first_of_part,
    heads,
    dim,
    MERGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Combine one row: some of its heads, with all of their elements. Names end in the strides of tensors."""
    number = tl.program_id(0).to(tl.int64)  # rows times strides pass 2**31
    row, of_part = first + number, first_of_part + number
    if index is not None:
        row = tl.load(index + number)
    if index_of_part is not None:
        of_part = tl.load(index_of_part + number)
    head = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
    element = tl.arange(0, WIDTH)
    inside = (head < heads)[:, None] & (element < dim)[None, :]
    left_at = row * source_row + head[:, None] * source_head + element[None, :]
    right_at = of_part * part_row + head[:, None] * part_head + element[None, :]
    left = tl.load(source + left_at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(part + right_at, mask=inside, other=0.0).to(tl.float32)
    if MERGES:
        lse_at = lse + row * lse_row + head * lse_head
        mine = tl.load(lse_at, mask=head < heads, other=0.0)
        other = tl.load(part_lse + of_part * part_lse_row + head * part_lse_head, mask=head < heads, other=0.0)
        largest = tl.maximum(mine, other)
        none = largest == float("-inf")
        anchor = tl.where(none, 0.0, largest)
        merged = tl.where(none, largest, anchor + tl.log(tl.exp(mine - anchor) + tl.exp(other - anchor)))
        weight = tl.where(none, 0.0, tl.exp(other - tl.where(none, 0.0, merged)))
        result = left + weight[:, None] * (right - left)
        tl.store(lse_at, merged, mask=head < heads)
    else:
        result = left + right
    target_at = row * target_row + head[:, None] * target_head + element[None, :]
    tl.store(target + target_at, result.to(target.dtype.element_ty), mask=inside)
