"""Images by the processor of a model type that uses Pillow, in the place of random tensors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from ...compat import pillow_processor
from .makers import Inputs, patch_of, vision_of


def processed(config: PreTrainedConfig, size: int, made: Inputs) -> Inputs | None:
    """Make an image of noise by the image processor of a type, set to the sizes of a tiny model.

    Args:
        config: the configuration of the tiny model.
        size: the number of the size of the image, 0 or 1.
        made: the tensors of a maker for such an image, which tell the shapes.

    Returns:
        The tensors, with those of the processor among them; None if there is none without torchvision, or it makes
        tensors of other shapes.
    """
    try:
        from PIL import Image

        processor = pillow_processor(config)
        noise = torch.randint(256, (*_extent(config, size, made), 3), generator=torch.Generator().manual_seed(size))
        image = Image.fromarray(noise.byte().numpy())
        found = processor(**_settings(processor, config, made))(images=[image], return_tensors="pt")
        own = {name: found[name].to(tensor.dtype) for name, tensor in made.items() if name in found}
    except Exception:  # processors raise errors of many kinds where they take no small sizes
        return None
    alike = all(tensor.shape == made[name].shape for name, tensor in own.items())
    return {**made, **own} if alike and "pixel_values" in own else None


def _extent(config: PreTrainedConfig, size: int, made: Inputs) -> tuple[int, int]:
    """Compute height and width of an image that becomes tensors of these shapes when it is resized."""
    patch = patch_of(vision_of(config))
    for name, unit in (("image_grid_thw", patch), ("target_sizes", patch), ("image_sizes", 1)):
        if name in made:
            height, width = made[name][0][-2:].tolist()
            return height * unit - 1, width * unit - 1
    side = made["pixel_values"].shape[-1] * (2 - size) + 3  # any is resized to the size that the model takes
    return side, side


def _settings(processor: type, config: PreTrainedConfig, made: Inputs) -> dict[str, Any]:
    """Build the settings of a processor, those that it has, by the names that processors use."""
    vision, pixels = vision_of(config), made["pixel_values"]
    side = max(pixels.shape[-2:])
    sizes = {
        "size": side,
        "crop_size": side,
        "max_image_size": side,
        "high_res_size": made.get("high_res_pixel_values", pixels).shape[-1],
        "patch_size": patch_of(vision),
        "temporal_patch_size": getattr(vision, "temporal_patch_size", 1),
        "merge_size": getattr(vision, "spatial_merge_size", 2),
        "image_grid_pinpoints": getattr(config, "image_grid_pinpoints", None),
        "do_image_splitting": False,
        "min_image_tokens": 1,
    }
    found = {}
    for name in (name for name in sizes if hasattr(processor, name)):
        fields = getattr(processor, name)
        found[name] = dict.fromkeys(fields, sizes[name]) if isinstance(fields, dict) else sizes[name]
    if "merge_size" in found:  # images have any size
        found["size"] = {"shortest_edge": 1, "longest_edge": 10**6}
    return found
