"""Planner: choices and strategies of one rank, kept for batches that are alike.

It needs no process group and no device. So a worker of a data loader can plan a batch before its step, by a copy of
the planner. What it has planned is learned by the planner of the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config import ContextParallelConfig
from ..planning.balanced import layouts
from ..planning.layout import Layout
from ..planning.machine import Machine
from ..planning.mask import Document, Mask, Pattern
from ..planning.recent import Recent
from .auto_strategy import Choice, choose
from .strategy import Shape, Strategy, build_strategy, with_padding

ALIKE = 32
"""Most strategies, choices and kinds of layers that are kept."""
PLANNED = 2**27
"""Bytes of row numbers on the host from which fewer strategies are kept. A device holds as many, for each stream.

Rows that lie in few ranges take none, so those of one document do not."""


class Layer(NamedTuple):
    """Properties of a layer on which its strategy depends, beside the batch.

    Args:
        comm_type: one of `COMM_TYPES`.
        pattern: rule by which a token reads the tokens of its document.
        shape: heads, head dims and dtype.
        device: type of the device whose rates are used in estimates.
        padding: True to compute the queries of padding too.
    """

    comm_type: str
    pattern: Pattern
    shape: Shape
    device: str
    padding: bool = False


class Planner:
    """Makes the part of one rank in computing masks.

    Args:
        config: the settings of the group.
        rank: the rank in the group.
        machines: rates for estimates, by the type of the device. They are the same on all ranks.

    Attributes:
        free: bytes that a layer may need at its peak, by the type of the device; the same on all ranks. Without them
            everything fits.
    """

    def __init__(self, config: ContextParallelConfig, rank: int, machines: Mapping[str, Machine]):
        self.config, self.rank, self.machines = config, rank, machines
        self.free: dict[str, float] = {}
        self._layers: dict[Layer, None] = {}
        self._choices: Recent[Choice] = Recent(ALIKE)
        self._strategies: Recent[Strategy] = Recent(ALIKE, PLANNED, lambda strategy: strategy.nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process has made nothing yet."""
        return Planner, (self.config, self.rank, dict(self.machines))

    def choice(self, layer: Layer, layout: Layout, mask: Mask) -> Choice:
        """Choose the strategy of a layer, by the layout and the mask of the whole batch."""
        free = self.free.get(layer.device, math.inf) if layer.comm_type == "auto" else math.inf
        machine = self.machines[layer.device]
        key = layer.comm_type, layout, mask, layer.shape, machine, free
        return self._choices.get(
            key, lambda: choose(self.config, layer.comm_type, layout, mask, layer.shape, machine, free)
        )

    def strategy(self, layer: Layer, layout: Layout, mask: Mask) -> Strategy:
        """Make the part of this rank. Layers and batches that are alike share it."""
        if not layer.pattern.blocks:  # those of other batches lie elsewhere
            self._layers[layer] = self._layers.pop(layer, None)
        while len(self._layers) > ALIKE:
            del self._layers[next(iter(self._layers))]
        comm_type, inner, together, groups, _ = self.choice(layer, layout, mask)

        def make() -> Strategy:
            made = build_strategy(comm_type, inner, layout, mask, self.rank, together, groups)
            return with_padding(made, layout, mask) if layer.padding else made

        return self._strategies.get((comm_type, inner, together, groups, layout, mask, layer.padding), make)

    def plan(self, layout: Layout, rows: tuple[tuple[Document, ...], ...]) -> None:
        """Make the strategies of a batch for all layers that were met.

        Raises:
            ValueError: if a layer cannot be computed so.
        """
        for layer in list(self._layers):
            self.strategy(layer, layout, Mask(layout.length, rows, layer.pattern))

    @property
    def met(self) -> tuple[tuple[Layer, ...], dict[str, float]]:
        """Layers that were met, and `free`. It can be pickled."""
        return tuple(self._layers), dict(self.free)

    def meet(self, met: tuple[tuple[Layer, ...], dict[str, float]]) -> None:
        """Take the layers and `free` of another planner in the place of one's own."""
        layers, self.free = met
        self._layers = dict.fromkeys(layers)

    def take_made(self) -> list[list[tuple[Any, Any]]]:
        """Return what this process has made since the last call, for `learn`. The first call returns nothing."""
        return [cache.take_made() for cache in (layouts, self._choices, self._strategies)]

    def learn(self, made: list[list[tuple[Any, Any]]]) -> None:
        """Keep what another process has made."""
        caches: list[Recent[Any]] = [layouts, self._choices, self._strategies]
        for cache, entries in zip(caches, made):
            for key, value in entries:
                cache.put(key, value)
