"""Features of media that stay with the ranks that encoded them, until it is known which rank has their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ...distributed.host import beside
from ...distributed.mesh import Ranks
from ..deferred import Deferred
from .gathering import Placement, gather_rows

CASTS = tuple(getattr(torch.Tensor, name) for name in ("to", "float", "double", "half", "bfloat16", "contiguous"))
"""Methods of tensors that act on each entry by itself."""
SHAPES = (torch.Tensor.view, torch.Tensor.reshape)


class Takers(Protocol):
    """Tokens of a batch that take a feature each; see `border.marks.Marks`."""

    def rows_of(self, rank: int) -> torch.Tensor:
        """Return the rows of the features that the tokens of a rank take, in the order of these tokens."""


class Encoded:
    """Features that the ranks have encoded in one call of a tower.

    Args:
        values: tensors `[rows, ...]` of this rank. Rows that belong to none of its items follow the others.
        placements: for each tensor, the places of the rows of all ranks.
    """

    def __init__(self, values: Sequence[torch.Tensor], placements: Sequence[Placement]):
        self.values, self.placements = values, placements

    @cached_property
    def gathered(self) -> tuple[torch.Tensor, ...]:
        """Rows of all items, on every rank. All tensors are gathered by one node of the graph."""
        return gather_rows(self.values, self.placements)


class DeferredFeatures(Deferred):
    """Features of all items, `[rows, ..., D]`, or of one item, of which a rank has those that it has encoded.

    Args:
        encoded: the features that the ranks have encoded.
        number: number of the tensor in it.
        rows: number of rows of each item.
        item: the item, or None for all.
    """

    def __init__(self, encoded: Encoded, number: int, rows: Sequence[int], item: int | None = None):
        self._encoded, self._number, self._rows, self._item = encoded, number, rows, item
        self._casts: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
        self._is_flat = False

    def of_items(self) -> list[DeferredFeatures]:
        """Return the features of each item."""
        return [DeferredFeatures(self._encoded, self._number, self._rows, item) for item in range(len(self._rows))]

    @property
    def ranks(self) -> Ranks:
        """Ranks that have encoded the features."""
        return self._placement.ranks

    @property
    def shape(self) -> torch.Size:
        rows = sum(self._rows) if self._item is None else self._rows[self._item]
        shape = torch.Size((rows, *self._values.shape[1:]))
        return torch.Size((shape[:-1].numel(), shape[-1])) if self._is_flat else shape

    @property
    def dtype(self) -> torch.dtype:
        return self._cast(self._values[:0]).dtype

    @property
    def device(self) -> torch.device:
        return self._cast(self._values[:0]).device

    @property
    def local(self) -> torch.Tensor:
        """Vectors `[n, D]` that this rank has encoded, cast."""
        return self._cast(self._values).flatten(0, -2)

    def owners(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each vector the rank that has it, and its row there, on the host."""
        places, most = self._placement.places, self._placement.most
        if self._item is not None:
            places = places.split(list(self._rows))[self._item]
        inner = self._values.shape[1:-1].numel()
        rows = (places % most)[:, None] * inner + torch.arange(inner)
        return (places // most).repeat_interleave(inner), rows.flatten()

    @property
    def _values(self) -> torch.Tensor:
        return self._encoded.values[self._number]

    @property
    def _placement(self) -> Placement:
        return self._encoded.placements[self._number]

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        for cast in self._casts:
            x = cast(x)
        return x

    def _make(self) -> torch.Tensor:
        whole = self._encoded.gathered[self._number]
        whole = self._cast(whole if self._item is None else whole.split(list(self._rows))[self._item])
        return whole.flatten(0, -2) if self._is_flat else whole

    def _recorded(self, function: Callable, args: tuple, options: dict[str, Any]) -> Any:
        """Record casts, the concatenation of all items, and the shape `[n, D]`."""
        if self.is_made:
            return None
        others, width = (*args[1:], *options.values()), self.shape[-1]
        if args[0] is self and not any(isinstance(x, (torch.Tensor, Deferred)) for x in others):
            if function in CASTS:
                some = self._cast(self._values[:0])
                if function(some, *args[1:], **options) is some:  # a cast of tensors returns the tensor itself
                    return self
                return self._changed(_casts=(*self._casts, lambda x: function(x, *args[1:], **options)))
            if function in SHAPES and others in ((-1, width), ((-1, width),)):
                return self._changed(_is_flat=True)
            if function is torch.Tensor.flatten and others == (0, 1) and self.ndim == 3:
                return self._changed(_is_flat=True)
        if function is torch.cat and others in ((), (0,)) and self._are_all(args[0]):
            return DeferredFeatures(self._encoded, self._number, self._rows)
        return None

    def _are_all(self, pieces: Any) -> bool:
        """Return whether some features are those of all items in their order."""
        return len(pieces) == len(self._rows) and all(
            isinstance(x, DeferredFeatures)
            and (x._encoded, x._number, x._item) == (self._encoded, self._number, item)
            and not x._casts
            and not x.is_made
            for item, x in enumerate(pieces)
        )


def exchanged(wanted: Sequence[tuple[DeferredFeatures, Takers]]) -> tuple[torch.Tensor, ...]:
    """Send features to the ranks whose tokens take them.

    All are sent in one node of the graph, so that ranks return gradients in the same order.

    Args:
        wanted: features, each with the tokens that take them. The entries and their order are the same on all ranks.

    Returns:
        For each entry, vectors `[n, D]` in the order of the tokens of this rank.
    """
    if not wanted:
        return ()
    routes = [_Route(features, marks) for features, marks in wanted]
    taken: tuple[torch.Tensor, ...] = _Exchange.apply(routes, *(features.local for features, _ in wanted))
    return taken


class _Route:
    """Way of vectors to the ranks that take them."""

    def __init__(self, features: DeferredFeatures, takers: Takers):
        self._ranks = features.ranks
        owners, rows = features.owners()
        every = [takers.rows_of(rank) for rank in range(self._ranks.size)]
        sent = [rows[numbers][owners[numbers] == self._ranks.rank] for numbers in every]
        self._sent, self._gives = torch.cat(sent), [len(numbers) for numbers in sent]
        taken = owners[every[self._ranks.rank]]
        self._gets = taken.bincount(minlength=self._ranks.size).tolist()
        # Vectors arrive by the ranks that send them, and are taken in the order of the tokens.
        self._order = taken.argsort(stable=True)
        self._places = self._order.argsort()

    def send(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the tokens of this rank take, of the vectors of all ranks."""
        received = self._moved(x.index_select(0, beside(self._sent, x)), self._gives, self._gets)
        return received.index_select(0, beside(self._places, x))

    def send_back(self, grad: torch.Tensor, count: int) -> torch.Tensor:
        """Return the gradients of the vectors of this rank. Those that no token takes get 0."""
        received = self._moved(grad.index_select(0, beside(self._order, grad)), self._gets, self._gives)
        return grad.new_zeros(count, grad.shape[1]).index_copy(0, beside(self._sent, grad), received)

    def _moved(self, x: torch.Tensor, gives: list[int], gets: list[int]) -> torch.Tensor:
        received = x.new_empty(sum(gets), x.shape[1])
        dist.all_to_all_single(received, x.contiguous(), gets, gives, group=self._ranks.group)
        return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, routes: Sequence[_Route], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.routes, ctx.counts = routes, [len(x) for x in tensors]
        taken = tuple(route.send(x) for route, x in zip(routes, tensors))
        ctx.mark_non_differentiable(*(x for x, wanted in zip(taken, ctx.needs_input_grad[1:]) if not wanted))
        return taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = zip(ctx.routes, grads, ctx.counts, ctx.needs_input_grad[1:])
        return None, *(route.send_back(grad, count) if wanted else None for route, grad, count, wanted in parts)
