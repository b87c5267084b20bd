"""Outputs of a tower, taken apart by items, and put together again from the features of all items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.utils import ModelOutput

from ...compat import tree_leaves
from ...distributed.agreement import fingerprint
from .deferred_features import DeferredFeatures
from .division import Division

FEATURES = "pooler_output"
LEVELS = "deepstack_features"
"""Field that holds a list of features, one for each of some layers of the tower."""
INSIDE = ("last_hidden_state", "hidden_states", "attentions")
"""Fields that hold what a tower computes inside. The decoder gets nothing of them, so they are left out."""


class Part(NamedTuple):
    """Features of the items of this rank.

    Args:
        name: the field of the output.
        values: `[rows, ...]`, the rows of the items in their order.
        rows: number of rows of each item. Where only the order of items is known, the first item has those of all.
        kind: the type that holds the tensors of the items, or None for one tensor.
    """

    name: str
    values: torch.Tensor
    rows: list[int]
    kind: type | None

    @property
    def form(self) -> tuple:
        """Properties that are the same on all ranks if the part is understood."""
        values = self.values
        return self.name, self.kind, tuple(values.shape[1:]), str(values.dtype), values.requires_grad


class Parts(list[Part]):
    """All parts of an output."""

    def __init__(self, output: ModelOutput, division: Division, items: Sequence[int]):
        """Take an output apart.

        Args:
            division: the division of the call.
            items: the items that the output has.

        Raises:
            ValueError: if it is not clear which features are those of which item.
        """
        super().__init__()
        if not isinstance(output, ModelOutput) or output.get(FEATURES) is None:
            raise ValueError("a tower returned no features.")
        self.kind = type(output)
        self._again = [name for name in INSIDE if output.get(name) is output[FEATURES]]
        """Fields that hold the features a second time."""
        self._division, self._ratios = division, []
        for name, value in output.items():
            if name in INSIDE or not _has_values(value):
                continue
            if name == LEVELS and isinstance(value, (list, tuple)):
                self.extend(self._part(name, level, items) for level in value)
            else:
                self.append(self._part(name, value, items))

    @property
    def mark(self) -> int:
        """Number that is the same on all ranks if the output is understood."""
        return fingerprint({"kind": self.kind.__name__, "parts": [x.form for x in self], "ratios": self._ratios})

    def _part(self, name: str, value: Any, items: Sequence[int]) -> Part:
        division = self._division
        if isinstance(value, torch.Tensor):
            return Part(name, value, self._rows(value, items), None)
        pieces = list(value) if isinstance(value, (list, tuple)) else []
        if not pieces or not all(isinstance(piece, torch.Tensor) and piece.dim() for piece in pieces):
            raise ValueError(f"{name} holds no tensors.")
        if len({(piece.shape[1:], piece.dtype) for piece in pieces}) > 1:
            raise ValueError(f"{name} holds tensors of different widths.")
        if len(pieces) != (1 if division.one_row else len(items)):
            raise ValueError(f"{name} holds {len(pieces)} tensors, for {len(items)} items.")
        rows = self._rows(pieces[0], items) if division.one_row else [len(piece) for piece in pieces]
        return Part(name, torch.cat(pieces), rows, type(value))

    def _rows(self, value: torch.Tensor, items: Sequence[int]) -> list[int]:
        """Return the number of rows of each item in one tensor."""
        division, rows = self._division, len(value) if value.dim() else 0
        if division.patches is not None:  # so many patches make one row
            patches = [division.patches[item] for item in items]
            ratio = sum(patches) // rows if rows else 0
            if not ratio or ratio * rows != sum(patches) or any(number % ratio for number in patches):
                raise ValueError(f"{rows} rows are no part of {sum(patches)} patches.")
            self._ratios.append(ratio)
            return [number // ratio for number in patches]
        if value.dim() > 2 and rows and rows % len(items) == 0:
            self._ratios.append(rows // len(items))
            return [rows // len(items)] * len(items)
        if value.dim() == 2 and division.in_order:
            return [rows] + [0] * (len(items) - 1)
        raise ValueError(f"{rows} rows cannot be divided by {len(items)} items.")

    def joined(self, values: Sequence[DeferredFeatures]) -> ModelOutput:
        """Make the output of all items.

        Args:
            values: for each part, the features of all items in their order.
        """
        fields: dict[str, Any] = {}
        for part, whole in zip(self, values):
            value: Any = whole
            if part.kind is not None:
                value = part.kind([whole] if self._division.one_row else whole.of_items())
            if part.name == LEVELS:
                fields.setdefault(LEVELS, []).append(value)
            else:
                fields[part.name] = value
        return self.kind(**fields, **dict.fromkeys(self._again, fields[FEATURES]))


def same_features(found: ModelOutput, expected: ModelOutput) -> bool:
    """Return whether the features of an output are those of another one, up to rounding."""
    for name, value in found.items():
        pairs = list(zip(tree_leaves(value), tree_leaves(expected.get(name))))
        counts = len(tree_leaves(value)), len(tree_leaves(expected.get(name)))
        if counts[0] != counts[1] or not all(_close(a, b) for a, b in pairs):
            return False
    return {name for name, value in expected.items() if _has_values(value)} <= {*found, *INSIDE}


def _has_values(value: Any) -> bool:
    """Return whether a field of an output holds anything. What a tower does not have is None or empty."""
    return value is not None and not (isinstance(value, (list, tuple)) and not value)


def _close(found: Any, expected: Any) -> bool:
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor) or found.shape != expected.shape:
        return False
    if not found.is_floating_point() or not found.numel():
        return torch.equal(found, expected)
    bound = torch.finfo(found.dtype).eps ** 0.5 * expected.abs().max()
    return bool((found - expected).abs().max() <= bound)
