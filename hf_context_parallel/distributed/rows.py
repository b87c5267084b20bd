"""Selected rows of a tensor, copied by ranges if there are few ranges, and by an index otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import torch

FEW = 8
"""Number of ranges from which an index is used. With fewer, copying each range takes less time."""


class Rows:
    """Rows by their numbers, in any order, without duplicates.

    Args:
        numbers: the numbers `[n]`, on the CPU.
    """

    def __init__(self, numbers: torch.Tensor):
        self._numbers = numbers
        self._on: dict[torch.device, torch.Tensor] = {}
        breaks = (numbers.diff() != 1).nonzero().flatten() + 1 if len(numbers) else numbers
        self._ranges: list[tuple[int, int]] | None = None
        """First row and number of rows of each range, or None if there are `FEW` ranges or more."""
        if len(breaks) < FEW:
            edges = [0, *breaks.tolist(), len(numbers)]
            self._ranges = [
                (int(numbers[start]), stop - start) for start, stop in zip(edges, edges[1:]) if start < stop
            ]

    def __len__(self) -> int:
        return len(self._numbers)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Take these rows of `x`, one after another. One range is returned as a view."""
        if self._ranges is None:
            return x.index_select(0, self._index(x.device))
        parts = [x[first : first + count] for first, count in self._ranges]
        return parts[0] if len(parts) == 1 else torch.cat([x[:0], *parts])

    def _index(self, device: torch.device) -> torch.Tensor:
        """Index on a device. It is made once for each device."""
        if device not in self._on:
            self._on[device] = self._numbers.to(device, non_blocking=True)
        return self._on[device]

    @staticmethod
    def move(
        source: torch.Tensor, taken: Rows | None, target: torch.Tensor, put: Rows | None, add: bool = False
    ) -> None:
        """Copy the rows `taken` of `source` to the rows `put` of `target`, or add them. None means all rows."""
        here_ranges = _all(source) if taken is None else taken._ranges
        there_ranges = _all(target) if put is None else put._ranges
        if here_ranges is None or there_ranges is None:
            moved = source if taken is None else taken.of(source)
            if put is None:
                target.add_(moved) if add else target.copy_(moved)
            elif add:
                target.index_add_(0, put._index(target.device), moved)
            else:
                target.index_copy_(0, put._index(target.device), moved)
            return
        for here, there, count in _common(here_ranges, there_ranges):
            part = target[there : there + count]
            part.add_(source[here : here + count]) if add else part.copy_(source[here : here + count])


def _all(x: torch.Tensor) -> list[tuple[int, int]]:
    return [(0, len(x))]


def _common(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Cut two lists of ranges with equally many rows at the same places.

    Yields:
        The first row of each cut range on the left and on the right, and its number of rows.
    """
    here, there = ([list(pair) for pair in reversed(side)] for side in (left, right))
    while here and there:
        count = min(here[-1][1], there[-1][1])
        yield here[-1][0], there[-1][0], count
        for side in (here, there):
            side[-1][0] += count
            side[-1][1] -= count
            if not side[-1][1]:
                side.pop()
