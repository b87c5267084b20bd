"""Samples with images for tiny models, and their collator: pixels have other rows than the batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_context_parallel.data.batch import IGNORED
from hf_context_parallel.verification.types.check import Case
from hf_context_parallel.verification.types.tiny import TEXT, tiny_config
from tests.helpers.models import some_labels

IMAGES = ((0,), (0, 1), (), (), (), (1,), (1, 0, 0), ())
"""Images of each sample: 0 is a small one, 1 a larger one. The third and the fourth sample are a batch without any."""
GRIDS = ((4, 4), (4, 8))
"""Heights and widths of images in patches, of which four are a token."""
MARKS = {"qwen3_vl": (50, 48, 51), "gemma3": (48, 50, 49), "llava": (0, 48, 0)}
"""Ids of the beginning of an image, its placeholders, and its end. A 0 is left out."""
TYPES = {"qwen3_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}
"""Argument that marks the tokens of images."""
FILLS = {"labels": IGNORED}


def image_model(model_type: str, attention: str | None) -> PreTrainedModel:
    """Make a tiny model in float64 that takes images, and is the same for every value of `attention`."""
    return Case(tiny_config(model_type), media=True).model(attention)


def image_samples(model_type: str, images: Any = IMAGES) -> list[dict[str, torch.Tensor]]:
    """Make documents of many lengths with images: tensors `[S]`, and pixels of all images of a sample."""
    return [_sample(model_type, number, sizes) for number, sizes in enumerate(images)]


def _sample(model_type: str, number: int, sizes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(number)
    begin, token, end = MARKS[model_type]
    ids = [_text(random, 5 + 3 * number)]
    pixels, grids = [], []
    for size in sizes:
        height, width = GRIDS[size]
        count = height * width // 4 if model_type == "qwen3_vl" else 16
        ids += [torch.tensor([x for x in (begin, *[token] * count, end) if x]), _text(random, 4)]
        grids.append([1, height, width])
        side = 56 if model_type == "llava" else 64
        shape = (height * width, 1536) if model_type == "qwen3_vl" else (1, 3, side, side)
        pixels.append(torch.randn(shape, generator=random, dtype=torch.float64))
    input_ids = torch.cat(ids)
    are_text = input_ids < TEXT
    sample = {
        "input_ids": input_ids,
        "labels": some_labels(input_ids, number).masked_fill(~are_text, IGNORED),
        "attention_mask": torch.ones_like(input_ids),
    }
    if model_type in TYPES:
        sample[TYPES[model_type]] = (input_ids == token).long()
    if sizes:
        sample["pixel_values"] = torch.cat(pixels)
    if sizes and model_type == "qwen3_vl":
        sample["image_grid_thw"] = torch.tensor(grids)
    return sample


def _text(random: torch.Generator, length: int) -> torch.Tensor:
    return torch.randint(3, TEXT, (length,), generator=random)


def image_collator(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad tokens to one length, and join the pixels of all rows. A batch without an image has none."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if values[0].dim() > 1:
            batch[name] = torch.cat(values)
        else:
            batch[name] = torch.stack(
                [torch.nn.functional.pad(x, (0, longest - len(x)), value=FILLS.get(name, 0)) for x in values]
            )
    return batch
