"""Tokens that a mask marks, such as those of images, and the features that they take: a vector for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ...data.batch import take_columns
from ...data.shard import Shard
from ...distributed.host import beside, on_host
from ..towers.deferred_features import DeferredFeatures, exchanged


class Marks:
    """Marked tokens of a batch, such as those of images, whose features have a row for each.

    Args:
        marks: `[B, S]` or `[B, S, 1]`.
        shard: the shard of this rank.
    """

    def __init__(self, marks: torch.Tensor, shard: Shard):
        self._marks = on_host(marks).view(shard.batch_size, shard.length)
        self._numbers = (self._marks.flatten().cumsum(0) - 1).view_as(self._marks)
        self._shard = shard
        self.count = int(self._marks.sum())

    @staticmethod
    def can_be(x: Any, shard: Shard) -> bool:
        """Return whether an argument is a mask that may mark tokens."""
        of_batch = (shard.batch_size, shard.length)
        return isinstance(x, torch.Tensor) and x.dtype == torch.bool and x.shape in (of_batch, (*of_batch, 1))

    @cached_property
    def local(self) -> torch.Tensor:
        """Mask of the tokens of this rank, `[B, S_local]`, on the host."""
        return self._taken(self._marks, self._shard.rank)

    def rows_of(self, rank: int) -> torch.Tensor:
        """Return the rows of the marked tokens of a rank, in the order of its tokens, `[n]`, on the host."""
        return self._taken(self._numbers, rank)[self._taken(self._marks, rank)]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Take the rows of the tokens of this rank, of a tensor `[count, ...]`."""
        return x.index_select(0, beside(self.rows_of(self._shard.rank), x))

    def _taken(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        layout = self._shard.layout
        return take_columns(x, layout.positions(rank), layout.length, 0)


class Wanted:
    """Features that the tokens of a shard take.

    Args:
        features: `[..., D]`, with a vector for each marked token.
        marks: the tokens.
    """

    def __init__(self, features: torch.Tensor | DeferredFeatures, marks: Marks):
        self.features, self.marks = features, marks

    @staticmethod
    def taken(wanted: Sequence[Wanted]) -> list[torch.Tensor]:
        """Return the features that the tokens of this rank take, `[n, D]` each. All ranks must ask for them alike."""
        sent = [x for x in wanted if isinstance(x.features, DeferredFeatures) and not x.features.is_made]
        received = dict(zip(map(id, sent), exchanged([(x.features, x.marks) for x in sent])))
        return [received[id(x)] if id(x) in received else x._of_whole() for x in wanted]

    def _of_whole(self) -> torch.Tensor:
        """Take the vectors of this rank, of features that every rank has."""
        features = self.features.whole if isinstance(self.features, DeferredFeatures) else self.features
        return self.marks.take(features.flatten(0, -2))
