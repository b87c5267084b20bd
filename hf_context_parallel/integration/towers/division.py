"""Division of a call of a tower by items, which are images, videos or sounds. A call that is not known has none."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch

from ...distributed.host import on_host
from ...memory.tower_facts import TowerSizes
from .dealing import dealt, dealt_in_order

GRIDS = ("image_grid_thw", "video_grid_thw")
"""Arguments `[n, 3]` that hold the frames, rows and columns of the patches of each item."""
SIZES = "image_sizes"
"""Argument `[n, 2]` that holds the height and width of each image."""
LENGTHS = "feature_attention_mask"
"""Argument `[n, frames]` of sounds, which have features by their length: the tower encodes no padding."""
BY_ITEM = (
    SIZES,
    LENGTHS,
    "audio_feature_lengths",
    "high_res_pixel_values",
    "image_merge_sizes",
    "image_position_ids",
    "input_features_mask",
    "pixel_attention_mask",
    "pixel_mask",
    "spatial_shapes",
    "video_merge_sizes",
)
"""Other arguments `[n, ...]` that describe each item by itself."""
OF_TOWER = ("output_hidden_states", "output_attentions")
"""Arguments that ask for what a tower computes inside."""


class Division(NamedTuple):
    """Call of a tower, divided by items.

    Args:
        given: the arguments of the call by name.
        pixels: name of the argument that holds what is encoded.
        by_item: names of the arguments `[n, ...]`.
        costs: the cost of each item.
        patches: number of patches of each item, if the pixels are `[patches, ...]` and not `[n, ...]`.
        in_order: True if each rank gets consecutive items, in the order of the ranks.
        one_row: True if the items are the images of the only row of `[1, n, C, H, W]`.
    """

    given: Mapping[str, Any]
    pixels: str
    by_item: tuple[str, ...]
    costs: list[int]
    patches: list[int] | None = None
    in_order: bool = True
    one_row: bool = False

    def shares(self, ranks: int) -> list[list[int]]:
        """Deal the items to ranks."""
        return (dealt_in_order if self.in_order else dealt)(self.costs, ranks)

    @property
    def cheapest(self) -> int:
        """Number of the cheapest item."""
        return self.costs.index(min(self.costs))

    def taken(self, items: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of a call for some of the items."""
        local = dict(self.given)
        for name in self.by_item:
            local[name] = self._rows(local[name], items)
        pixels = local[self.pixels]
        if self.patches is None:
            local[self.pixels] = self._rows(pixels, items)
        else:
            pieces = pixels.split(self.patches)
            local[self.pixels] = torch.cat([pieces[item] for item in items])
        return local

    def some(self, ranks: int) -> Division:
        """Return the call for the cheapest items: as many as cost no more than the share of a rank, but two at least.

        A trial with them needs no more memory than the call itself.
        """
        cheapest = sorted(range(len(self.costs)), key=lambda item: (self.costs[item], item))
        loads = list(accumulate(self.costs[item] for item in cheapest))
        count = max(2, sum(load * ranks <= loads[-1] for load in loads))
        items = sorted(cheapest[:count])
        costs = [self.costs[item] for item in items]
        patches = None if self.patches is None else [self.patches[item] for item in items]
        return self._replace(given=self.taken(items), costs=costs, patches=patches)

    def _rows(self, value: Any, items: Sequence[int]) -> Any:
        if not isinstance(value, torch.Tensor):
            return [value[item] for item in items]
        follow = items[-1] - items[0] + 1 == len(items)
        chosen = slice(items[0], items[-1] + 1) if follow else list(items)
        return value[:, chosen] if self.one_row else value[chosen]


def divide(given: Mapping[str, Any], pixels: str, config: Any) -> Division | None:
    """Divide a call of a tower by items.

    Args:
        given: the arguments of the call by name.
        pixels: name of the argument that holds what is encoded.
        config: the configuration of the tower, or None.

    Returns:
        The division; None if the call cannot be divided.
    """
    values = {name: value for name, value in given.items() if value is not None}
    x = values.get(pixels)
    if not isinstance(x, torch.Tensor) or any(values.get(name) for name in OF_TOWER):
        return None
    tensors = {name for name, value in values.items() if isinstance(value, torch.Tensor) and value.dim()} - {pixels}
    lists = {name for name in (SIZES,) if isinstance(values.get(name), (list, tuple))}
    described = tuple(sorted(tensors | lists))
    grids = [name for name in described if name in GRIDS]
    if any(name not in (*GRIDS, *BY_ITEM) for name in described) or len(grids) > 1:
        return None
    found = (
        _by_grid(values, pixels, described, grids[0], config)
        if grids
        else _by_first(values, pixels, described, config)
    )
    return None if found is None else found._replace(given=given)


def _by_grid(
    values: Mapping[str, Any], pixels: str, described: tuple[str, ...], grid: str, config: Any
) -> Division | None:
    """Divide pixels `[patches, ...]` by the grids of their items."""
    rows = on_host(values[grid]).tolist()
    if (
        values[grid].dim() != 2
        or values[grid].shape[1] != 3
        or any(len(values[name]) != len(rows) for name in described)
    ):
        return None
    patches = [prod(row) for row in rows]
    if min(patches, default=0) < 1 or sum(patches) != len(values[pixels]):
        return None
    sizes = TowerSizes.of(config)
    return Division(values, pixels, described, [sizes.cost(*row) for row in rows], patches, in_order=False)


def _by_first(values: Mapping[str, Any], pixels: str, described: tuple[str, ...], config: Any) -> Division | None:
    """Divide pixels `[n, ...]`, or the images of `[1, n, C, H, W]`."""
    x = values[pixels]
    if x.dim() < 3 or not x.numel():
        return None
    if x.dim() == 5 and SIZES not in described and _has_empty(x):  # models leave out the images that pad a row
        return None
    if lists_by_row(pixels, x, described):
        if any(values[name].shape[:2] != x.shape[:2] for name in described):
            return None
        return Division(values, pixels, described, [_cost_of_image(x[0], config)] * x.shape[1], one_row=True)
    if any(len(values[name]) != len(x) for name in described):
        return None
    if SIZES in described:
        sizes, tower = torch.as_tensor(values[SIZES]), TowerSizes.of(config)
        patch = getattr(config, "patch_size", None)
        if sizes.dim() != 2 or sizes.shape[1] != 2 or not isinstance(patch, int):
            return None
        costs = [tower.cost(1, max(1, h // patch), max(1, w // patch)) for h, w in on_host(sizes).tolist()]
        return Division(values, pixels, described, costs, in_order=False)
    if LENGTHS in described:
        tower = TowerSizes.of(config)
        frames = on_host(values[LENGTHS]).sum(-1).tolist()
        return Division(values, pixels, described, [tower.cost(1, 1, max(1, int(count))) for count in frames])
    return Division(values, pixels, described, [_cost_of_image(x, config)] * len(x))


def _cost_of_image(x: torch.Tensor, config: Any) -> int:
    """Compute the cost of an item of pixels `[n, ..., H, W]`, or of sounds `[n, ..., frames]`, all of one size."""
    patch = getattr(config, "patch_size", None)
    if x.dim() < 4 or not isinstance(patch, int):
        return TowerSizes.of(config).cost(1, 1, x.shape[-1])
    height, width = (max(1, side // patch) for side in x.shape[-2:])
    several = x.shape[-4] if x.dim() > 4 else 1  # images of a row, or tiles of an image
    return TowerSizes.of(config).cost(several, height, width)


def lists_by_row(name: str, x: torch.Tensor, described: Container[str]) -> bool:
    """Return whether pixels are the images of one row, `[1, n, C, H, W]`."""
    return x.dim() == 5 and len(x) == 1 and name == "pixel_values" and SIZES not in described


def _has_empty(x: torch.Tensor) -> bool:
    """Return whether an image of `[B, n, C, H, W]` is zero everywhere."""
    return not bool(x.flatten(2).any(-1).all())
