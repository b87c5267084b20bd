"""Portions: the rows of each part of a sum, grouped by the number of parts that they have had before.

A part holds some rows of a total, as the output of a kernel call holds those of its queries. Rows that only one part
holds need no sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .intervals import Interval

Numbers = npt.NDArray[np.int64]


class Portion(NamedTuple):
    """Rows of a part with the same past and future.

    Args:
        part: the rows, numbered in the part.
        rows: the same rows, numbered in the total.
        before: number of earlier parts that hold them: 0, 1, or 2 for two and more.
        last: True if no later part holds them.
    """

    part: tuple[Interval, ...]
    rows: tuple[Interval, ...]
    before: int
    last: bool


@dataclass(frozen=True)
class Portions:
    """Portions of each part of a total.

    Args:
        rows: number of rows of the total.
        of_parts: the portions of each part, in the order in which they have to be added.
        complete: True if parts hold all rows.
        most: largest number of parts that hold a row.
    """

    rows: int
    of_parts: tuple[tuple[Portion, ...], ...]
    complete: bool
    most: int


def portions_of(parts: Sequence[tuple[Interval, ...]], rows: int) -> Portions:
    """Find the portions of parts, given the rows of the total that each part holds, in order.

    A part may hold a row more than once. Then its portions hold the row once each.
    """
    layers = [list(_layers(runs)) for runs in parts]
    total = np.zeros(rows, dtype=np.int64)
    for _, numbers in (layer for of_part in layers for layer in of_part):
        total[numbers] += 1
    met = np.zeros_like(total)
    of_parts = []
    for of_part in layers:
        found: list[Portion] = []
        for places, numbers in of_part:
            before = np.minimum(met[numbers], 2)
            met[numbers] += 1
            last = met[numbers] == total[numbers]
            kinds = 2 * before + last
            for kind in np.unique(kinds):
                chosen = kinds == kind
                found.append(Portion(_runs(places[chosen]), _runs(numbers[chosen]), int(kind) // 2, bool(kind % 2)))
        of_parts.append(tuple(found))
    return Portions(rows, tuple(of_parts), bool(total.all()), int(total.max(initial=0)))


def _layers(runs: tuple[Interval, ...]) -> Iterator[tuple[Numbers, Numbers]]:
    """Divide a part into layers that hold each row once at most: its rows in the part, and in the total."""
    layers: list[list[tuple[int, Interval]]] = []
    offset = 0
    for start, stop in runs:
        layer = next((layer for layer in layers if layer[-1][1][1] <= start), None)
        if layer is None:
            layers.append(layer := [])
        layer.append((offset, (start, stop)))
        offset += stop - start
    for layer in layers:
        places = [np.arange(offset, offset + stop - start) for offset, (start, stop) in layer]
        yield np.concatenate(places), np.concatenate([np.arange(*run) for _, run in layer])


def _runs(numbers: Numbers) -> tuple[Interval, ...]:
    """Turn numbers, in any order, into runs of ascending neighbours."""
    edges = np.flatnonzero(np.diff(numbers) != 1) + 1
    starts, stops = np.append(0, edges), np.append(edges, len(numbers))
    return tuple(zip(numbers[starts].tolist(), (numbers[stops - 1] + 1).tolist()))
