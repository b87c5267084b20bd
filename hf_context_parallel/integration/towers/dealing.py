"""Costs of the items that a tower encodes, and their dealing to ranks. Host integers only, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class TowerSizes(NamedTuple):
    """Sizes of a tower, as far as costs depend on them. The defaults are those of a tower of which nothing is known.

    Args:
        width: width of the hidden states.
        inner: width of the MLP.
        layers: number of layers.
        windowed: number of layers whose attention stays within windows.
        side: patches along a side of a window.
    """

    width: int = 1024
    inner: int = 4096
    layers: int = 1
    windowed: int = 0
    side: int = 1

    @classmethod
    def of(cls, config: Any) -> TowerSizes:
        """Read the sizes of a tower from its configuration, or from None."""
        width = _number(config, "embed_dim", "hidden_size", "d_model") or cls().width
        inner = _number(config, "intermediate_size", "encoder_ffn_dim") or 4 * width
        layers = _number(config, "depth", "num_hidden_layers", "encoder_layers") or 1
        patch, window = _number(config, "patch_size"), _number(config, "window_size")
        full = getattr(config, "fullatt_block_indexes", None)
        if full is None or not patch or not window:
            return cls(width, inner, layers)
        merge = _number(config, "spatial_merge_size") or 1
        return cls(width, inner, layers, layers - len(full), max(1, window // patch // merge) * merge)

    def pairs(self, frames: int, height: int, width: int) -> int:
        """Count the pairs of patches that attend to each other, over all layers. Frames do not see each other."""
        full = (height * width) ** 2
        windows = _squares(height, self.side) * _squares(width, self.side)
        return frames * ((self.layers - self.windowed) * full + self.windowed * windows)

    def cost(self, frames: int, height: int, width: int) -> int:
        """Compute the cost of an item, in products of two numbers, over twice the width.

        A layer takes `2 * width * (2 * width + inner)` products for a patch, and `2 * width` for a pair.
        """
        patches = frames * height * width
        return self.layers * patches * (2 * self.width + self.inner) + self.pairs(frames, height, width)


def dealt(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal items to ranks, the most expensive first, each to the rank that has the least so far.

    Returns:
        The items of each rank, in ascending order.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += costs[item]
    return [sorted(share) for share in shares]


def dealt_in_order(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal items to ranks so that the items of a rank follow those of the rank before, with the least largest load.

    Returns:
        The items of each rank, in ascending order.
    """
    low, high = max(costs, default=0), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(costs, middle)) <= ranks:
            high = middle
        else:
            low = middle + 1
    shares = _filled(costs, low)
    return shares + [[] for _ in range(ranks - len(shares))]


def _filled(costs: Sequence[int], most: int) -> list[list[int]]:
    """Fill shares in order, each with a load of at most `most`."""
    shares: list[list[int]] = [[]]
    load = 0
    for item, cost in enumerate(costs):
        if load + cost > most:
            shares.append([])
            load = 0
        shares[-1].append(item)
        load += cost
    return shares


def _squares(length: int, side: int) -> int:
    """Sum the squares of the lengths of pieces of a side."""
    whole, rest = divmod(length, side)
    return whole * side**2 + rest**2


def _number(config: Any, *names: str) -> int | None:
    """Return the first field with one of these names that is a number, or None."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
