"""Explanation of errors of a model around a decoder: it computes whole batches, with images, as on one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ...distributed.host import on_host

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
