"""Batches with images, video and sound for tiny models of all image-text and audio-text types.

Each medium is made by the *maker* of its family: the arguments of a model's forward tell which family it belongs to.
The number of its placeholder tokens is counted by the model itself, which encodes it once. No processor is needed,
since the pixels are random, and the tokens that processors put around images are text to the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

from ...compat import causal_lm_classes, image_text_classes, multimodal_classes
from ...data.batch import IGNORED
from .tiny import TEXT

Inputs = dict[str, torch.Tensor]
KINDS = ("image", "video", "audio")
"""Kinds of media. The number of each, counted from 1, is the type of its tokens in `mm_token_type_ids`."""


class Medium(NamedTuple):
    """An image, a video or a sound."""

    kind: str
    inputs: Inputs
    """Arguments of the forward for it."""
    ids: torch.Tensor
    """Its tokens `[n]`: placeholders, and marks around them."""
    token: int
    """The id of its placeholders."""


class Batch(NamedTuple):
    """A batch, and what one process computes in its place."""

    inputs: Inputs
    parts: list[Inputs]
    """The documents of a packed batch, each alone; else the batch."""


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
    if model.config.model_type in _SOUND_ALONG:
        kinds = {"audio": [[loud], [loud]]}
    found = {kind: _whole(model, rows, random) for kind, rows in kinds.items() if rows}
    if model.config.model_type in _SOUND_ALONG:
        return found
    medium = next((medium for medium in (small, long, loud) if medium), None)
    if medium is not None:
        rows = [[4, medium, 5], [6, medium, 7, medium, 8], [30]]
        for side in ("left", "right"):
            found[f"padded {side}"] = _padded(model, rows, random, side)
        if model.config.model_type not in _UNPACKED and not _needs_media(model):
            found["packed"] = _packed(
                model, [[6, medium, 5], [3], [9, large or medium, 4, medium, 2], [11], [8]], random
            )
    return found


def _needs_media(model: PreTrainedModel) -> bool:
    """Return whether the forward has to be given images."""
    pixels = inspect.signature(model.forward).parameters.get("pixel_values")
    return pixels is not None and pixels.default is inspect.Parameter.empty


_SOUND_ALONG = {"voxtral_realtime"}
"""Types that add a sound to the tokens of each row instead of putting it between them."""
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
    config = _media_config(model.config)
    for of_kind, needed, maker in _MAKERS:
        arguments, _, fields = needed.partition(" of ")
        if (
            of_kind == kind
            and taken.issuperset(arguments.split())
            and all(_has(config, name) for name in fields.split())
        ):
            inputs = maker(config, size, random)
            inputs = {name: value for name, value in inputs.items() if name in taken}
            token = _placeholder(config, kind)
            return Medium(kind, inputs, _tokens(model, kind, token, _features(model, kind, inputs)), token)
    return None


_LENGTHS = {"qwen2_audio": 16}
"""Numbers of placeholders of types without a function that encodes a medium."""


def _tokens(model: PreTrainedModel, kind: str, token: int, length: int) -> torch.Tensor:
    """Make the tokens of a medium: its placeholders between the ids that mark its beginning and its end.

    Where a model takes the frames of videos apart by what is between them, a token of text is.
    """
    config = _media_config(model.config)
    found = torch.full((length,), token)
    if config.model_type in _SOUND_ALONG:
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
    names = [f"{name}_{ending}" for name in kinds for ending in ("token_id", "token_index", "patch_id")]
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), IGNORED)


_VIDEOS_AS_IMAGES = {"glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr", "glm5_next", "nemotron_h_omni"}
"""Types in which the placeholders of videos are those of images."""


def _media_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return getattr(config, "thinker_config", config)


def _vision(config: PreTrainedConfig) -> PreTrainedConfig:
    config = getattr(config, "encoder", config)
    return getattr(config, "vision_config", config)


def _random(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64)


def _first(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """Return the first of these fields that a configuration has; of a list, its first entry."""
    value = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)
    return value[0] if isinstance(value, (list, tuple)) else value


def _channels(vision: PreTrainedConfig) -> int:
    return _first(vision, "num_channels", "in_channels", "in_chans", default=3)


def _patch(vision: PreTrainedConfig) -> int:
    return _first(vision, "patch_size", default=14)


_GRIDS = ((6, 8), (4, 8))
"""Heights and widths of images, in patches."""


def _side(vision: PreTrainedConfig) -> int:
    return _first(vision, "image_size", default=4 * _patch(vision))


def _pixels(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of the only size that a model takes."""
    vision = _vision(config)
    pixels = _random(random, 1, _channels(vision), _side(vision), _side(vision))
    sharper = _vision_named(config, "high_res_vision_config")
    return {
        "pixel_values": pixels,
        "high_res_pixel_values": _random(random, 1, 3, _side(sharper), _side(sharper)),
        "qformer_input_ids": torch.ones(1, 4, dtype=torch.int64),
    }


def _vision_named(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    return getattr(config, name, _vision(config))


def _frames(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make a video of two frames."""
    vision = _vision(config)
    return {"pixel_values_videos": _random(random, 1, 2, _channels(vision), _side(vision), _side(vision))}


def _frames_of_a_question(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make a video of two frames with a question to it."""
    frames = _frames(config, size, random)["pixel_values_videos"]
    return {"pixel_values": frames, "qformer_input_ids": torch.ones(1, 4, dtype=torch.int64)}


def _tiles_of_a_row(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of several tiles of a model whose images are listed by rows."""
    vision = _vision(config)
    tiles, side = vision.max_num_tiles, _side(vision)
    return {
        "pixel_values": _random(random, 1, 1, tiles, _channels(vision), side, side),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.int64),
    }


def _quantized(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image whose patches become ids of the vocabulary."""
    height, width = (32, 16 if size and config.model_type == "emu3" else 32)
    return {"pixel_values": _random(random, 1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}


def _grid(frames: int, names: tuple[str, str]) -> Callable:
    """Return the maker of patches in a grid of time, height and width."""

    def make(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
        vision = _vision(config)
        patch, steps = _patch(vision), _first(vision, "temporal_patch_size", default=1)
        if config.model_type in _TWO_FRAMES:
            steps = 2
        height, width = _GRIDS[size]
        shape = _channels(vision), patch, patch
        if config.model_type not in _UNFLATTENED:
            shape = (_channels(vision) * steps * patch * patch,)
        return {
            names[0]: _random(random, frames * height * width, *shape),
            names[1]: torch.tensor([[frames, height, width]]),
            "image_merge_sizes": torch.tensor([2]),
            "video_merge_sizes": torch.tensor([2]),
            **({"video_second_per_grid": torch.tensor([2.0])} if frames > 1 else {}),
        }

    return make


_TWO_FRAMES = {"muse_glimmer", "muse_spark"}
"""Types whose patches are two frames deep, though no field says so."""
_UNFLATTENED = {"kimi_k25", "paddleocr_vl"}
"""Types whose patches have channels, height and width."""


def _of_its_size(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of its own size, which is padded beside larger ones."""
    patch = _patch(_vision(config))
    height, width = (patch * sides for sides in ((4, 4), (4, 2))[size])
    pixels = _random(random, 1, _channels(_vision(config)), height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


def _tiled(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image that is cut into tiles, beside a tile with all of it."""
    vision = _vision(config)
    side = _side(vision)
    height, width = config.image_grid_pinpoints[size]
    tiles = 1 + (height // side) * (width // side)
    pixels = _random(random, 1, tiles, _channels(vision), side, side)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


def _of_patches(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of flattened patches, with a mask of the real ones."""
    vision = _vision(config)
    patch, (height, width) = _patch(vision), _GRIDS[size]
    return {
        "pixel_values": _random(random, 1, height * width, _channels(vision) * patch**2),
        "pixel_attention_mask": torch.ones(1, height * width, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[height, width]]),
    }


def _placed(frames: int, names: tuple[str, str]) -> Callable:
    """Return the maker of flattened patches, each with its place."""

    def make(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
        vision = _vision(config)
        patch = _first(vision, "model_patch_size", "patch_size")
        height, width = ((9, 12), (6, 9))[size] if patch == vision.patch_size else ((3, 4), (2, 3))[size]
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
        return {
            names[0]: _random(random, frames, height * width, 3 * patch**2),
            names[1]: places.expand(frames, -1, -1),
            **({"num_frames_per_video": torch.tensor([frames])} if frames > 1 else {}),
        }

    return make


def _in_a_line(names: tuple[str, str]) -> Callable:
    """Return the maker of patches side by side in one line, for all images together."""

    def make(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
        vision = _vision(config)
        patch, (height, width) = _patch(vision), ((8, 16), (8, 8))[size]
        pixels = _random(random, 1, _channels(vision), patch, patch * height * width)
        return {names[0]: pixels, names[1]: torch.tensor([[height, width]])}

    return make


def _of_a_row(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of a model whose images are listed by rows."""
    side = _side(_vision(config))
    return {
        "pixel_values": _random(random, 1, 1, 3, side, side),
        "pixel_attention_mask": torch.ones(1, 1, side, side, dtype=torch.bool),
    }


def _tile_of_a_row(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of one or two tiles of a model whose tiles are listed by rows."""
    side = _side(_vision(config))
    return {
        "pixel_values": _random(random, 1, 2 - size, 3, side, side),
        "pixel_attention_mask": torch.ones(1, 2 - size, dtype=torch.bool),
    }


def _flat_grid(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make flattened patches in a grid of height and width."""
    vision = _vision(config)
    patch, (height, width) = _patch(vision), _GRIDS[size]
    return {
        "pixel_values": _random(random, height * width, 3 * patch**2),
        "image_grid_hw": torch.tensor([[height, width]]),
    }


def _all_patches(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make the flattened patches of an image."""
    return {"pixel_values": _random(random, 1, 12, 3 * config.patch_size**2)}


def _pooled(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image whose tokens are pools of patches: 4 of the whole image, and some of its crops."""
    vision = _vision(config)
    side = _side(vision) // _patch(vision)
    crops = (2, 1)[size]
    grid = torch.tensor([[2, 2, 2 * (crops - 1), 2]])
    tokens = 4 * crops
    pools = torch.arange(tokens * 4).view(tokens, 4) % (crops * side * side)
    return {
        "pixel_values": _random(random, crops, side * side, 3 * _patch(vision) ** 2),
        "image_token_pooling": pools,
        "image_grids": grid,
        "image_num_crops": torch.tensor([crops]),
    }


def _blocks(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of blocks of pixels, one for each token."""
    vision = _vision(config)
    height, width = (side // 2 for side in _GRIDS[size])
    side = _patch(vision) * vision.spatial_merge_size
    return {
        "pixel_values": _random(random, height * width, side, side, _channels(vision)),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def _pooled_video(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make a video of two frames, whose tokens are pools of patches."""
    vision = _vision(config)
    patches = (_side(vision) // _patch(vision)) ** 2
    return {
        "pixel_values_videos": _random(random, 2, patches, 3 * _patch(vision) ** 2),
        "video_token_pooling": torch.arange(2 * patches).view(8, -1),
        "video_grids": torch.tensor([[2, 2, 2]]),
    }


def _sound(mask: str) -> Callable:
    """Return the maker of a spectrogram `[1, bins, frames]` or `[1, frames, bins]` with a mask of its frames."""

    def make(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
        audio = next(getattr(config, name) for name in ("audio_config", "encoder_config") if hasattr(config, name))
        bins = _first(audio, *_BINS, default=128)
        bins *= getattr(audio, "num_stacked_frames", 1)
        window = 2 * getattr(audio, "n_window", 0)
        frames = window if 0 < window <= 100 else 64  # of one window
        if config.model_type in _SOUND_ALONG:
            frames *= 4
        shape = (frames, bins) if config.model_type in _FRAMES_FIRST else (bins, frames)
        inputs = {"input_features": _random(random, 1, *shape)}
        if mask:
            inputs[mask] = torch.ones(1, frames, dtype=torch.bool)
        return inputs

    return make


_BINS = ("num_mel_bins", "input_size", "input_dim", "n_mel_bins", "subsampling_conv_channels", "audio_embed_dim")
_FRAMES_FIRST = {
    "gemma4",
    "gemma4_unified",
    "nemotron_h_omni",
    "granite_speech",
    "granite_speech_plus",
    "fun_asr_nano",
}
"""Types whose spectrograms have frames first."""


def _chunk(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make a spectrogram with the number of its samples."""
    audio = config.audio_config
    return {
        "input_features": _random(random, 1, audio.feature_size, 64),
        "chunk_sample_lengths": torch.tensor([64 * audio.hop_length]),
    }


def _waveform(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make the samples of a sound."""
    shape = (1, 1, _SAMPLES)
    return {
        "input_values": _random(random, *shape),
        "padding_mask": torch.ones(1, _SAMPLES, dtype=torch.int64),
    }


_SAMPLES = 3200

_IMAGES = ("pixel_values", "image_grid_thw")
_VIDEOS = ("pixel_values_videos", "video_grid_thw")
_MAKERS: list[tuple[str, str, Callable]] = [
    ("image", "pixel_values image_grid_thw of inkling2_vision", _blocks),
    ("image", "pixel_values image_grid_thw", _grid(1, _IMAGES)),
    ("video", "pixel_values_videos video_grid_thw", _grid(2, _VIDEOS)),
    ("image", "pixel_values image_grid_hw", _flat_grid),
    ("image", "pixel_values image_sizes of image_grid_pinpoints", _tiled),
    ("image", "pixel_values image_sizes of pixtral", _of_its_size),
    ("image", "pixel_values of vocabulary_map", _quantized),
    ("image", "pixel_values aspect_ratio_ids", _tiles_of_a_row),
    ("video", "pixel_values qformer_input_ids of video_token_index", _frames_of_a_question),
    ("image", "pixel_values spatial_shapes", _of_patches),
    ("image", "pixel_values image_position_ids", _placed(1, ("pixel_values", "image_position_ids"))),
    ("video", "pixel_values_videos video_position_ids", _placed(2, ("pixel_values_videos", "video_position_ids"))),
    ("image", "pixel_values target_sizes", _in_a_line(("pixel_values", "target_sizes"))),
    ("video", "pixel_values_videos target_sizes_videos", _in_a_line(("pixel_values_videos", "target_sizes_videos"))),
    ("image", "pixel_values image_token_pooling", _pooled),
    ("image", "pixel_values pixel_attention_mask of granite_docling_vision", _tile_of_a_row),
    ("image", "pixel_values pixel_attention_mask", _of_a_row),
    ("image", "pixel_values image_patches", _all_patches),
    ("video", "pixel_values_videos video_token_pooling", _pooled_video),
    ("video", "pixel_values_videos", _frames),
    ("image", "pixel_values", _pixels),
    ("audio", "input_features feature_attention_mask", _sound("feature_attention_mask")),
    ("audio", "input_features chunk_sample_lengths", _chunk),
    ("audio", "input_features input_features_mask of audio_config", _sound("input_features_mask")),
    ("audio", "input_features of audio_config", _sound("")),
    ("audio", "input_features of encoder_config", _sound("")),
    ("audio", "input_values padding_mask", _waveform),
]
"""Kind of media; the arguments of forward, and fields or parts of the configuration, that it needs; and its maker.

The first that fits is taken.
"""
