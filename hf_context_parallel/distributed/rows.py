"""Selected rows of a tensor, copied by ranges if there are few ranges, and by an index otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

FEW = 8
"""Number of ranges from which an index is used. With fewer, copying each range takes less time."""


Pair = tuple[slice, slice]
"""Slices of two tensors with equally many rows."""


class Rows:
    """Rows by their numbers, in any order, without duplicates.

    Args:
        numbers: the numbers `[n]`, on the CPU.

    Attributes:
        run: the rows as one slice, or None if they are several ranges.
    """

    def __init__(self, numbers: torch.Tensor):
        self._count = len(numbers)
        self._on: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._common: dict[tuple[Rows | None, Rows | None], list[Pair] | None] = {}
        """Results of `in_common`, by the rows of the source and of the target."""
        breaks = (numbers.diff() != 1).nonzero().flatten() + 1 if len(numbers) else numbers
        self._ranges: list[tuple[int, int]] | None = None
        """First row and number of rows of each range, or None if there are `FEW` ranges or more."""
        if len(breaks) < FEW:
            edges = [0, *breaks.tolist(), len(numbers)]
            self._ranges = [
                (int(numbers[start]), stop - start) for start, stop in zip(edges, edges[1:]) if start < stop
            ]
        self._numbers = numbers if self._ranges is None else None  # a few ranges take less memory
        self.run: slice | None = None
        if self._ranges is not None and len(self._ranges) == 1:
            first, count = self._ranges[0]
            self.run = slice(first, first + count)

    @classmethod
    def of_runs(cls, runs: Sequence[tuple[int, int]]) -> Rows:
        """Rows of half-open intervals, one after another."""
        return cls(torch.cat([torch.arange(start, stop) for start, stop in runs]))

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Rows of several parts, one part after another. No row is in two of them."""
        return cls(torch.cat([part._all() for part in parts])) if parts else cls(torch.arange(0))

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers that are kept. Their index on a device takes as many."""
        return 0 if self._numbers is None else self._numbers.nbytes

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Take these rows of `x`, one after another. One range is returned as a view."""
        if self.run is not None:
            return cut(x, self.run)
        if self._ranges is None:
            return x.index_select(0, self.index(x.device))
        parts = [x[first : first + count] for first, count in self._ranges]
        return torch.cat(parts) if parts else x[:0]

    def index(self, device: torch.device) -> torch.Tensor:
        """Index `[n]` on a device. It is made once for each of its streams, and copied without a wait of the host."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if (device, stream) not in self._on:
            numbers = self._all()
            pinned = numbers.pin_memory() if device.type == "cuda" else numbers
            self._on[device, stream] = pinned.to(device, non_blocking=True)
        return self._on[device, stream]

    def _all(self) -> torch.Tensor:
        """Numbers of the rows, on the CPU."""
        if self._numbers is not None:
            return self._numbers
        return torch.cat([torch.arange(first, first + count) for first, count in self._ranges or [(0, 0)]])

    @staticmethod
    def move(
        source: torch.Tensor, taken: Rows | None, target: torch.Tensor, put: Rows | None, add: bool = False
    ) -> None:
        """Copy the rows `taken` of `source` to the rows `put` of `target`, or add them. None means all rows."""
        common = in_common(source, taken, target, put)
        if common is None:
            moved = source if taken is None else taken.of(source)
            if put is None:
                target.add_(moved) if add else target.copy_(moved)
            elif add:
                target.index_add_(0, put.index(target.device), moved.to(target.dtype))
            else:
                target.index_copy_(0, put.index(target.device), moved.to(target.dtype))
            return
        for here, there in common:
            to, part = cut(target, there), cut(source, here)
            to.add_(part) if add else to.copy_(part)


def cut(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """Take a range of rows. All rows are `x` itself, since making a view takes the host ten times this comparison."""
    return x if rows.start == 0 and rows.stop == x.shape[0] else x[rows]


def in_common(source: torch.Tensor, taken: Rows | None, target: torch.Tensor, put: Rows | None) -> list[Pair] | None:
    """Cut rows of two tensors into slices with equally many rows, or return None if an index takes less time.

    Args:
        taken, put: as many rows of `source` as of `target`. None means all rows.
    """
    known = taken if taken is not None else put
    if known is None:
        return [(slice(0, len(source)), slice(0, len(target)))]
    if (taken, put) not in known._common:
        everything = [(0, len(known))]
        left = everything if taken is None else taken._ranges
        right = everything if put is None else put._ranges
        known._common[taken, put] = None if left is None or right is None else list(_cut(left, right))
    return known._common[taken, put]


def _cut(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> Iterator[Pair]:
    here, there = ([list(pair) for pair in reversed(side)] for side in (left, right))
    while here and there:
        (first, left_over), (second, right_over) = here[-1], there[-1]
        count = min(left_over, right_over)
        yield slice(first, first + count), slice(second, second + count)
        for side in (here, there):
            side[-1][0] += count
            side[-1][1] -= count
            if not side[-1][1]:
                side.pop()
