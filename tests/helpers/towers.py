"""Helpers of the tests of towers: tiny multimodal models, and batches with images of several sizes for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedModel

from hf_context_parallel.verification.types import tiny
from tests.helpers.models import some_labels, tokens

MEDIA = 60
"""Id of the placeholder of a feature."""
QWEN = {"num_heads": 4, "hidden_size": 32, "intermediate_size": 48, "patch_size": 4, "spatial_merge_size": 2}
QWEN |= {"out_hidden_size": 32, "in_channels": 3, "temporal_patch_size": 2}
OF_QWEN = {"image_token_id": MEDIA, "video_token_id": 61, "vision_start_token_id": 59, "vision_end_token_id": 58}
SOUND = {"model_type": "glmasr_encoder", "hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4}
SOUND |= {"num_hidden_layers": 2, "num_mel_bins": 8}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2_5_vl": (
        AutoModelForImageTextToText,
        {"vision_config": {**QWEN, "depth": 3, "window_size": 16, "fullatt_block_indexes": [1]}, **OF_QWEN},
    ),
    "qwen3_vl": (
        AutoModelForImageTextToText,
        {
            "vision_config": {**QWEN, "depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
            **OF_QWEN,
        },
    ),
    "llava": (
        AutoModelForImageTextToText,
        {
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_attention_heads": 4,
                "num_hidden_layers": 3,
                "image_size": 12,
                "patch_size": 4,
            },
            "image_token_id": MEDIA,
        },
    ),
    "idefics3": (
        AutoModelForImageTextToText,
        {
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            "image_token_id": MEDIA,
            "scale_factor": 2,
        },
    ),
    "glmasr": (AutoModelForMultimodalLM, {"audio_config": SOUND, "audio_token_id": MEDIA}),
}
"""Types, each with the auto class and the fields that make its tower tiny."""
GRIDS = ((1, 2, 4), (1, 6, 4), (1, 2, 2), (1, 8, 6), (1, 4, 4), (1, 2, 8), (1, 10, 4), (1, 4, 6))
"""Frames, rows and columns of eight images."""


def multimodal(model_type: str, attention: str | None) -> PreTrainedModel:
    """Make a tiny multimodal model in float64, which is the same for every value of `attention`."""
    auto, changes = FAMILIES[model_type]
    config = tiny.tiny_config(model_type, **changes)
    if "qwen" in model_type:  # the parts of half a head for frames, rows and columns
        config.text_config.rope_parameters["mrope_section"] = [2, 1, 1]
    return tiny.tiny_model(config, attention, auto=auto)


def drawn(*shape: int) -> torch.Tensor:
    """Draw pixels in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def media(model_type: str, items: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Make the arguments of a model for some images or sounds, and the number of features of each."""
    if model_type in ("qwen2_5_vl", "qwen3_vl"):
        grids = torch.tensor(GRIDS[:items])
        patches = grids.prod(-1)
        pixels = drawn(int(patches.sum()), 3 * 2 * QWEN["patch_size"] ** 2)
        return {"pixel_values": pixels, "image_grid_thw": grids}, (patches // 4).tolist()
    if model_type == "llava":
        return {"pixel_values": drawn(items, 3, 12, 12)}, [9] * items
    lengths = torch.tensor([32 - 8 * (item % 3) for item in range(items)])
    mask = torch.arange(32) < lengths[:, None]
    return {"input_features": drawn(items, 8, 32), "input_features_mask": mask.long()}, (lengths // 8).tolist()


def batch_of(model_type: str, items: int) -> dict[str, torch.Tensor]:
    """Make a batch of one row: text, and the placeholders of some images or sounds in between, with labels."""
    arguments, features = media(model_type, items)
    text = tokens(1, 3 * (items + 1))[0].clamp(max=50)
    pieces = [text[:3]]
    for number, count in enumerate(features):
        pieces += [torch.full((count,), MEDIA), text[3 * number + 3 : 3 * number + 6]]
    ids = torch.cat(pieces)[None]
    labels = some_labels(ids).masked_fill(ids == MEDIA, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **arguments}
    if model_type in ("qwen2_5_vl", "qwen3_vl"):
        batch["mm_token_type_ids"] = (ids == MEDIA).int()
    return batch
