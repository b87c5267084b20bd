"""Explanation of errors of a model around a decoder, and a warning of media that its batch lacks.

Such a model computes whole batches, with images, as on one process.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...distributed.host import on_host
from ...distributed.mesh import world

logger = logging.getLogger(__name__)

PIXELS = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
"""Arguments that hold the grid of patches of each image or video, with that which holds the patches."""
REMEDY = "Make the whole batch by the processor of the model, and cut no row within an image"


def explained(error: Exception, model: PreTrainedModel, given: Mapping[str, Any]) -> Exception:
    """Return an error of Transformers with a remedy, where a call has media. Other errors are returned as they are.

    Args:
        error: an error that was raised before the decoder.
        model: the model around the decoder.
        given: the arguments of its call by name.
    """
    if _is_ours(error) or not any(name not in _TEXT and isinstance(x, torch.Tensor) for name, x in given.items()):
        return error
    for name, pixels in PIXELS.items():
        grid, patches = given.get(name), given.get(pixels)
        if isinstance(grid, torch.Tensor) and isinstance(patches, torch.Tensor):
            count = int(on_host(grid).prod(-1).sum())
            if count != len(patches):
                return ValueError(
                    f"{name} has {len(grid)} grids of {count} patches together, and {pixels} has {len(patches)} "
                    f"patches. Each row of {name} is the number of frames, rows and columns of patches of one item. "
                    f"{REMEDY}."
                )
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return ValueError(
        f"{kind}{str(error).rstrip('.')}. {type(model).__name__} raised this before its decoder, where media take the "
        f"places of placeholder tokens: each feature has one placeholder. {REMEDY}."
    )


_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels"}


def _is_ours(error: Exception) -> bool:
    """Return whether an error was raised by this package, whose messages have a remedy."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(__package__.split(".")[0])


_ENDINGS = ("token_id", "token_index", "patch_id")
"""Endings of the fields of a configuration that hold the id of a placeholder."""
_IMAGES = ("pixel_values", "pixel_values_images", "image_patches", "image_embeds")
_VIDEOS = ("pixel_values_videos",)
_SOUNDS = ("input_features", "input_values", "audio_input_ids")
_told: WeakSet[PreTrainedModel] = WeakSet()


def warn_of_missing_media(model: PreTrainedModel, parameters: Container[str], given: Mapping[str, Any]) -> None:
    """Say once of a model that a batch has placeholders of media, and no media of that kind.

    Transformers embeds them as words then, which is hardly meant. The first rank of the world says so.

    Args:
        model: the model around a decoder.
        parameters: the names of the arguments of its forward.
        given: the arguments of its call by name.
    """
    tokens = given.get("input_ids")
    if world().rank or model in _told or not isinstance(tokens, torch.Tensor):
        return
    missing = {
        token: (kind, names)
        for token, (kind, names) in _placeholders(model, parameters).items()
        if all(given.get(name) is None for name in names)
    }
    if not missing:
        return
    ids, mask = on_host(tokens), given.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        ids = ids[on_host(mask) != 0]
    for token, (kind, names) in missing.items():
        count = int((ids == token).sum())
        if count:
            _told.add(model)
            logger.warning(
                "%s was given %d placeholders of %s (token %d) and no %s, so they are embedded as words. Keep the "
                "column of the media in the data set (remove_unused_columns=False), and make batches by the processor "
                "of the model. If the batch is meant to have none, leave the placeholders out.",
                type(model).__name__,
                count,
                kind,
                token,
                next(name for name in names if name in parameters),
            )


def placeholders(config: PreTrainedConfig, kind: str) -> list[int]:
    """List the ids of placeholders that a configuration has for `"image"`, `"video"` or `"audio"`."""
    fields = (getattr(config, f"{kind}_{ending}", None) for ending in _ENDINGS)
    return [field for field in fields if isinstance(field, int)]


def _placeholders(model: PreTrainedModel, parameters: Container[str]) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Return the kind of media that each placeholder of a model stands for, and the arguments that may hold these.

    Some models take videos by the placeholders of images, or by the argument of images. Padding is no placeholder.
    """
    configs = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    padding = {getattr(config, "pad_token_id", None) for config in configs}
    videos = _VIDEOS if any(name in parameters for name in _VIDEOS) else _IMAGES
    found: dict[int, tuple[str, tuple[str, ...]]] = {}
    for kind, names in (("images", (*_IMAGES, *_VIDEOS)), ("videos", videos), ("audio", _SOUNDS)):
        token = next(iter(placeholders(model.config, kind.removesuffix("s"))), None)
        if token is not None and token not in {*padding, *found} and any(name in parameters for name in names):
            found[token] = kind, names
    return found
