"""Totals of parts: rows that several kernel calls compute are merged or added, and all others are written once.

A row that one call alone computes stays in the dtype of the call. With two calls it is combined and rounded once. Only
with more is it held in the accumulation dtype, until its last part.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, NamedTuple

import torch

from ..distributed.buffers import new_buffer
from ..distributed.messages import accumulation_dtype
from ..distributed.rows import Rows
from ..planning.intervals import total
from ..planning.portions import Portions
from . import merge


class Placed(NamedTuple):
    """Portion whose rows can be indexed; see `Portion`."""

    part: Rows
    rows: Rows
    before: int
    last: bool


class Places:
    """Portions of a total, ready for any device.

    Args:
        portions: the portions of each part.
    """

    def __init__(self, portions: Portions):
        self.rows, self.complete, self.most = portions.rows, portions.complete, portions.most
        self.of_parts = [
            [Placed(Rows.of_runs(p.part), Rows.of_runs(p.rows), p.before, p.last) for p in part]
            for part in portions.of_parts
        ]
        self._all = [
            all(p.before == 0 and p.part == p.rows for p in part) and sum(total(p.rows) for p in part) == self.rows
            for part in portions.of_parts
        ]

    def all_rows(self) -> list[Rows]:
        """All rows of the portions."""
        return [rows for part in self.of_parts for placed in part for rows in (placed.part, placed.rows)]

    def is_all(self, number: int) -> bool:
        """Return True if a part holds all rows, in order, and is the first to hold any."""
        return self._all[number]


class _Total(ABC):
    """Rows made of parts.

    Args:
        places: the rows of each part.
        value: tensor for the rows. None to take the first part if it holds all rows, or else to allocate it.
    """

    def __init__(self, places: Places, value: torch.Tensor | None = None):
        self._places = places
        self._value = value
        self._sums: torch.Tensor | None = None

    def _add(self, number: int, part: torch.Tensor) -> None:
        if self._value is None:
            if self._places.is_all(number):
                self._value = part
                return
            self._value = new_buffer(part, self._places.rows, *part.shape[1:])
            if not self._places.complete:
                self._value.zero_()
        value = self._value
        for placed in self._places.of_parts[number]:
            if placed.before == 0:
                Rows.move(part, placed.part, value, placed.rows)
                continue
            source = value if placed.before == 1 else self._held(value)
            self._combine(source, part, value if placed.last else self._held(value), placed)

    def _held(self, value: torch.Tensor) -> torch.Tensor:
        """Sums of rows that have had two parts, and will have more."""
        if self._sums is None:
            dtype = accumulation_dtype(value.dtype)
            self._sums = value if value.dtype == dtype else new_buffer(value, *value.shape, dtype=dtype)
        return self._sums

    @abstractmethod
    def _combine(self, source: torch.Tensor, part: torch.Tensor, target: torch.Tensor, placed: Placed) -> None:
        """Combine rows of `source` with rows of a part, and write them to `target`."""


class Sum(_Total):
    """Sum of parts. Rows that no part holds are 0."""

    def add(self, number: int, part: torch.Tensor) -> None:
        """Add part `number`."""
        self._add(number, part)

    @property
    def value(self) -> torch.Tensor | None:
        """The sum, once all parts are added. None if there are no parts."""
        return self._value

    def _combine(self, source: torch.Tensor, part: torch.Tensor, target: torch.Tensor, placed: Placed) -> None:
        combining(part).add_rows(source, part, target, placed.rows, placed.part)


class Output(_Total):
    """Output of attention merged from outputs over different keys, and its log-sum-exp (LSE).

    Rows that no part holds are 0, with an LSE of -inf.
    """

    def __init__(self, places: Places):
        super().__init__(places)
        self._lse: torch.Tensor | None = None
        self._part_lse: torch.Tensor

    def add(self, number: int, part: torch.Tensor, part_lse: torch.Tensor) -> None:
        """Merge part `number`, `[rows of the part, H, D]`, with its LSE `[rows of the part, H]`."""
        dtype = accumulation_dtype(part.dtype)
        if self._places.is_all(number):
            self._lse = part_lse if part_lse.dtype == dtype else part_lse.to(dtype)
        else:
            if self._lse is None:
                self._lse = part_lse.new_full((self._places.rows, part_lse.shape[1]), float("-inf"), dtype=dtype)
            for placed in self._places.of_parts[number]:
                if placed.before == 0:
                    Rows.move(part_lse, placed.part, self._lse, placed.rows)
        self._part_lse = part_lse
        self._add(number, part)
        del self._part_lse

    @property
    def value(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The output and its LSE, once all parts are merged. None if there are no parts."""
        return None if self._value is None or self._lse is None else (self._value, self._lse)

    def _combine(self, source: torch.Tensor, part: torch.Tensor, target: torch.Tensor, placed: Placed) -> None:
        assert self._lse is not None
        rows = placed.rows, placed.part
        combining(part).merge_rows(source, part, target, self._lse, self._part_lse, *rows)


def combining(part: torch.Tensor) -> Any:
    """Module that combines rows: `fused` on CUDA, where there is Triton and it has the dtype, or else `merge`."""
    return merge if not part.is_cuda or part.dtype == torch.float64 else _on_cuda()


@cache
def _on_cuda() -> Any:
    if importlib.util.find_spec("triton") is None:
        return merge
    from . import fused  # importing Triton takes time, and it is missing in builds for the CPU

    return fused
