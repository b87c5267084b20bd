"""Batches with images, video and sound for tiny models of all image-text and audio-text types.

Each medium is made by the *maker* of its family: the arguments of a model's forward tell which family it belongs to.
Its tensors are random, but images are made by the type's own processor where one works without torchvision. The number
of placeholder tokens is counted by the model itself, which encodes each medium once. The tokens that processors put
around images are text to the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

from ...compat import causal_lm_classes, image_text_classes, multimodal_classes
from ...data.batch import IGNORED
from ...integration.checks.media import placeholders
from .makers import MAKERS, SOUND_ALONG, Inputs, media_config
from .processors import processed
from .tiny import TEXT

KINDS = ("image", "video", "audio")
"""Kinds of media. The number of each, counted from 1, is the type of its tokens in `mm_token_type_ids`."""

AUXILIARY = "auxiliary loss"
"""Kind of batch that runs with the auxiliary loss of the router, for models that have one."""


class Medium(NamedTuple):
    """An image, a video or a sound."""

    kind: str
    inputs: Inputs
    """Arguments of the forward for it."""
    ids: torch.Tensor
    """Its tokens `[n]`: placeholders, and marks around them."""
    token: int
    """The id of its placeholders."""
    by_processor: bool = False
    """True if the processor of the type made it."""


class Batch(NamedTuple):
    """A batch, and what one process computes in its place."""

    inputs: Inputs
    parts: list[Inputs]
    """The documents of a packed batch, each alone; else the batch."""
    by_processor: bool = False
    """True if the processor of the type made its images."""


def media_types() -> list[str]:
    """List the types that take text and media: image-text models, and others that are no causal language models."""
    return sorted({*image_text_classes(), *(multimodal_classes().keys() - causal_lm_classes())})


_TIMM = "its vision tower needs the timm package, so that it was not tested"
_NO_TINY = "no tiny model of it has been made, so that it was not tested"
_NO_FORWARD = "Transformers gives it no forward. Train its thinker, which is a type of its own"
UNTESTED = {
    "apertus1p5": _NO_TINY,
    "diffusion_gemma": "Transformers computes no loss for it",
    "evolla": "AutoModel cannot build its encoder from its configuration, so that it was not tested",
    "fast_vlm": _TIMM,
    "gemma3n": _TIMM,
    "inkling_mm_model": "it needs the scipy package, so that it was not tested",
    "kyutai_speech_to_text": _NO_TINY,
    "llama4": "its forward raises AttributeError in this version of Transformers, with media and without",
    "nemo_speechlm": "no batch of sound has been made for it, so that it was not tested",
    "perception_lm": _TIMM,
    "pi0": "it is trained on actions of robots, and not on text",
    "qwen2_5_omni": _NO_FORWARD,
    "qwen3_omni_moe": _NO_FORWARD,
}
"""Types of which no tiny model can be trained on one process, each with the reason."""


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that builds a model which takes media."""
    is_image_text = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if is_image_text else AutoModelForMultimodalLM


def media_batches(model: PreTrainedModel) -> dict[str, Batch]:
    """Make a batch of each kind that matters for a model, with labels for some of its text.

    Args:
        model: a tiny model on one process, which counts the placeholders of each medium.
    """
    random = torch.Generator().manual_seed(0)
    small, large, long, loud = (_medium(model, kind, size, random) for kind, size in _WANTED)
    kinds = {
        "images": [[5, small, 6, large, 9], [23, large, 20], [31]] if small else None,
        "video": [[7, long, 8, long, 3], [40]] if long else None,
        "audio": [[7, loud, 8, loud, 3], [40]] if loud else None,
        "text": None if _needs_media(model) else [[37], [37]],
    }
    if model.config.model_type in SOUND_ALONG:
        kinds = {"audio": [[loud], [loud]]}
    found = {kind: _whole(model, rows, random) for kind, rows in kinds.items() if rows}
    if small and large:
        found["images"] = found["images"]._replace(by_processor=small.by_processor and large.by_processor)
    if model.config.model_type in SOUND_ALONG:
        return found
    medium = next((medium for medium in (small, long, loud) if medium), None)
    if medium is not None:
        rows = [[4, medium, 5], [6, medium, 7, medium, 8], [30]]
        for side in ("left", "right"):
            found[f"padded {side}"] = _padded(model, rows, random, side)
        if "output_router_logits" in _parameters(model):
            found[AUXILIARY] = found["padded left"]  # padding counts in no mean of the router
        if model.config.model_type not in _UNPACKED and not _needs_media(model):
            found["packed"] = _packed(
                model, [[6, medium, 5], [3], [9, large or medium, 4, medium, 2], [11], [8]], random
            )
    return found


def _needs_media(model: PreTrainedModel) -> bool:
    """Return whether the forward has to be given images."""
    pixels = inspect.signature(model.forward).parameters.get("pixel_values")
    return pixels is not None and pixels.default is inspect.Parameter.empty


_UNPACKED = {"hunyuan_vl"}
"""Types whose positions cannot tell documents: they have the axes of images and none of the text."""
_WANTED = (("image", 0), ("image", 1), ("video", 0), ("audio", 0))


def _whole(model: PreTrainedModel, rows: list[list], random: torch.Generator) -> Batch:
    """Make a batch of rows that text fills up to the same length."""
    longest = max(map(_length, rows))
    batch = _joined(model, [_row(model, [*row, longest - _length(row)], random) for row in rows])
    return Batch(batch, [batch])


def _padded(model: PreTrainedModel, rows: list[list], random: torch.Generator, side: str) -> Batch:
    """Make a batch of rows of several lengths."""
    longest = max(map(_length, rows))
    made = []
    for row in rows:
        inputs, missing = _row(model, row, random), longest - _length(row)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["labels"][:, 0] = IGNORED  # nothing is predicted from padding
        around = (missing, 0) if side == "left" else (0, missing)
        for name in _BY_TOKEN & inputs.keys():
            fill = IGNORED if name == "labels" else 0
            inputs[name] = torch.nn.functional.pad(inputs[name], around, value=fill)
        made.append(inputs)
    batch = _joined(model, made)
    return Batch(batch, [batch])


def _packed(model: PreTrainedModel, documents: list[list], random: torch.Generator) -> Batch:
    """Make a row of several documents, with positions that begin again in each."""
    parts = [_row(model, document, random) for document in documents]
    for part in parts:
        part["labels"][:, 0] = IGNORED
    positions = [_positions(model, part) for part in parts]
    if any(position.dim() == 3 for position in positions):  # documents of text have the same position on all axes
        positions = [position if position.dim() == 3 else position.expand(4, 1, -1) for position in positions]
    by_token = _BY_TOKEN & parts[0].keys() - {"attention_mask"}  # which would not tell documents
    joined = {name: torch.cat([part[name] for part in parts], 1) for name in sorted(by_token)}
    media = _joined(model, [{name: part[name] for name in part if name not in _BY_TOKEN} for part in parts], True)
    return Batch({**joined, **media, "position_ids": torch.cat(positions, -1)}, parts)


def _positions(model: PreTrainedModel, part: Inputs) -> torch.Tensor:
    """Make the positions of one document: `[1, S]`, or `[4, 1, S]` for a model with three axes of positions."""
    length = part["input_ids"].shape[1]
    plain = torch.arange(length)[None]
    make = _having(model, "get_rope_index")
    if make is None or not part.keys() - _BY_TOKEN:  # there is text alone
        return plain
    taken = inspect.signature(make).parameters
    positions = make(**{name: value for name, value in part.items() if name in taken})[0]
    return torch.cat([plain[None], positions.long()]) if positions.dim() == 3 else plain


_BY_TOKEN = {"input_ids", "labels", "attention_mask", "mm_token_type_ids", "token_type_ids"}
"""Names of inputs `[B, S]`."""


_NEEDS_MASK = {"qwen2_5_omni_thinker", "qwen2_audio", "qwen3_omni_moe_thinker"}
"""Types that make their positions from the attention mask."""


def _length(row: list) -> int:
    return sum(len(part.ids) if isinstance(part, Medium) else part for part in row)


def _row(model: PreTrainedModel, row: list, random: torch.Generator) -> Inputs:
    """Make a row of numbers of text tokens, and media."""
    ids, types, media = [], [], []
    for part in row:
        if isinstance(part, Medium):
            ids.append(part.ids)
            types.append((part.ids == part.token) * (KINDS.index(part.kind) + 1))
            media.append(part.inputs)
        else:
            ids.append(torch.randint(3, TEXT, (part,), generator=random))
            types.append(torch.zeros(part, dtype=torch.int64))
    input_ids, types = torch.cat(ids)[None], torch.cat(types)[None]
    drawn = torch.rand(input_ids.shape, generator=random) > 0.4
    inputs = {"input_ids": input_ids, "labels": input_ids.masked_fill(drawn | (types > 0), IGNORED)}
    for name in {"mm_token_type_ids", "token_type_ids"} & _parameters(model):
        inputs[name] = types
    if model.config.model_type in _NEEDS_MASK:
        inputs["attention_mask"] = torch.ones_like(input_ids)
    return inputs | _joined(model, media, within_row=True)


def _joined(model: PreTrainedModel, parts: list[Inputs], within_row: bool = False) -> Inputs:
    """Join inputs along their first dimension, in which other dimensions are padded to the longest.

    Args:
        within_row: the parts are media of one row, which some models list along the second dimension.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    taken = _parameters(model)
    in_line = {"pixel_values", "pixel_values_videos"} if "target_sizes" in taken else set()
    by_row = _BY_ROW if _lists_by_rows(taken) else set()
    joined = {}
    for name in names:
        tensors = [part[name] for part in parts if name in part]
        if name in by_row and not within_row:  # rows without images list empty ones
            tensors = [part.get(name, torch.zeros_like(tensors[0][:, :1])) for part in parts]
        if name.endswith("_token_pooling"):  # places among the patches of all images
            pixels = "pixel_values" if name.startswith("image") else "pixel_values_videos"
            before = accumulate((part[pixels].shape[:2].numel() for part in parts if name in part), initial=0)
            tensors = [tensor + offset for tensor, offset in zip(tensors, before)]
        dim = -1 if name in in_line else 1 if name in by_row and within_row else 0
        joined[name] = _concatenated(name, tensors, dim)
    return joined


_BY_ROW = {"pixel_values", "pixel_attention_mask", "aspect_ratio_ids", "aspect_ratio_mask"}


def _lists_by_rows(taken: set[str]) -> bool:
    """Return whether images are listed `[B, number of images, ...]`."""
    return bool({"pixel_attention_mask", "aspect_ratio_ids"} & taken) and "spatial_shapes" not in taken


def _concatenated(name: str, tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    dim %= tensors[0].dim()
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors))]
    fill = -1 if name.endswith("position_ids") else 0
    padded = []
    for tensor in tensors:
        target = tensor.new_full((*shape[:dim], tensor.shape[dim], *shape[dim + 1 :]), fill)
        target[tuple(slice(size) for size in tensor.shape)] = tensor
        padded.append(target)
    return torch.cat(padded, dim)


def _medium(model: PreTrainedModel, kind: str, size: int, random: torch.Generator) -> Medium | None:
    """Make a medium of a kind, if the model takes it. Its features are counted by the model."""
    if kind == "image" and _having(model, "get_video_features") and not _having(model, "get_image_features"):
        return None  # its pixels are those of videos
    taken = _parameters(model)
    config = media_config(model.config)
    for of_kind, needed, maker in MAKERS:
        arguments, _, fields = needed.partition(" of ")
        if (
            of_kind == kind
            and taken.issuperset(arguments.split())
            and all(_has(config, name) for name in fields.split())
        ):
            inputs = maker(config, size, random)
            inputs = {name: value for name, value in inputs.items() if name in taken}
            own = processed(config, size, inputs) if kind == "image" else None
            inputs, token = own or inputs, _placeholder(config, kind)
            ids = _tokens(model, kind, token, _features(model, kind, inputs))
            return Medium(kind, inputs, ids, token, own is not None)
    return None


_LENGTHS = {"qwen2_audio": 16}
"""Numbers of placeholders of types without a function that encodes a medium."""


def _tokens(model: PreTrainedModel, kind: str, token: int, length: int) -> torch.Tensor:
    """Make the tokens of a medium: its placeholders between the ids that mark its beginning and its end.

    Where a model takes the frames of videos apart by what is between them, a token of text is.
    """
    config = media_config(model.config)
    found = torch.full((length,), token)
    if config.model_type in SOUND_ALONG:
        return torch.arange(length) % TEXT
    index = _having(model, "get_rope_index")
    if kind == "video" and index is not None and "repeat_interleave" in inspect.getsource(index):
        first, second = found.chunk(2)
        found = torch.cat([first, torch.tensor([3]), second])
    about = kind if kind == "audio" or hasattr(config, f"{kind}_start_token_id") else "vision"
    marks = [getattr(config, f"{about}_{place}_token_id", None) for place in ("start", "end")]
    begin, end = (torch.tensor([] if mark is None else [mark], dtype=torch.int64) for mark in marks)
    return torch.cat([begin, found, end])


def _has(config: PreTrainedConfig, name: str) -> bool:
    """Return whether a configuration has a field, or a part of a model type with this name."""
    parts = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return getattr(config, name, None) is not None or any(part.model_type == name for part in parts)


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _having(model: PreTrainedModel, name: str) -> Any:
    """Return a method of the model or of the model within it, or None."""
    modules = (getattr(model, "model", None), model.base_model, model)
    return next((getattr(module, name) for module in modules if hasattr(module, name)), None)


def _features(model: PreTrainedModel, kind: str, inputs: Inputs) -> int:
    """Count the features of a medium."""
    encode = _having(model, f"get_{kind}_features")
    if encode is None:
        return _LENGTHS.get(model.config.model_type, 0)
    taken = inspect.signature(encode).parameters
    with torch.no_grad():
        found = encode(**{name: value for name, value in inputs.items() if name in taken})
    if getattr(found, "pooler_output", None) is None and hasattr(found, "deepstack_features"):  # of each layer
        found = found.deepstack_features[0][1]
    for name in ("pooler_output", "last_hidden_state"):
        found = found if getattr(found, name, None) is None else getattr(found, name)
    found = [found] if isinstance(found, torch.Tensor) else found
    return sum(features.shape[:-1].numel() for features in found)


def _placeholder(config: PreTrainedConfig, kind: str) -> int:
    """Return the id of a kind's placeholder. Some models use that of images for videos."""
    kinds = [kind, "image"] if kind == "video" else [kind]
    if kind == "video" and config.model_type in _VIDEOS_AS_IMAGES:
        kinds = ["image"]
    return next((token for name in kinds for token in placeholders(config, name)), IGNORED)


_VIDEOS_AS_IMAGES = {"glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr", "glm5_next", "nemotron_h_omni"}
"""Types in which the placeholders of videos are those of images."""
