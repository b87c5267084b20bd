"""Some rows of a tensor: by ranges where they are few, as chunks of a sequence are, and else by an index."""

from __future__ import annotations

from collections.abc import Iterator

import torch

FEW = 8
"""Ranges up to which copying each of them costs less than an index, which touches every row by itself."""


class Rows:
    """Rows by their numbers, in any order, none of them twice.

    Args:
        numbers: `[n]`, on the CPU.
    """

    def __init__(self, numbers: torch.Tensor):
        self._numbers = numbers
        self._on: dict[torch.device, torch.Tensor] = {}
        breaks = (numbers.diff() != 1).nonzero().flatten() + 1 if len(numbers) else numbers
        self._ranges: list[tuple[int, int]] | None = None
        """The first and how many, of each range; None where they are many."""
        if len(breaks) < FEW:
            edges = [0, *breaks.tolist(), len(numbers)]
            self._ranges = [
                (int(numbers[start]), stop - start) for start, stop in zip(edges, edges[1:]) if start < stop
            ]

    def __len__(self) -> int:
        return len(self._numbers)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of `x`, one after another: a view where they are one range."""
        if self._ranges is None:
            return x.index_select(0, self._index(x.device))
        parts = [x[first : first + count] for first, count in self._ranges]
        return parts[0] if len(parts) == 1 else torch.cat([x[:0], *parts])

    def _index(self, device: torch.device) -> torch.Tensor:
        """Made once a device: a layer finds it there."""
        if device not in self._on:
            self._on[device] = self._numbers.to(device, non_blocking=True)
        return self._on[device]

    @staticmethod
    def move(
        source: torch.Tensor, taken: Rows | None, target: torch.Tensor, put: Rows | None, add: bool = False
    ) -> None:
        """Copy the rows `taken` of `source` to the rows `put` of `target`, or add them. None: all rows."""
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
    """Two lists of ranges of as many rows, cut alike: where each range begins on either side, and its rows."""
    here, there = ([list(pair) for pair in reversed(side)] for side in (left, right))
    while here and there:
        count = min(here[-1][1], there[-1][1])
        yield here[-1][0], there[-1][0], count
        for side in (here, there):
            side[-1][0] += count
            side[-1][1] -= count
            if not side[-1][1]:
                side.pop()
