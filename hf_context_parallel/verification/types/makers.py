"""Makers of what tiny models take for an image, a video or a sound, by the arguments of their forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

Inputs = dict[str, torch.Tensor]
SOUND_ALONG = {"voxtral_realtime"}
"""Types that add a sound to the tokens of each row instead of putting it between them."""


def media_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the part of a model that takes media."""
    return getattr(config, "thinker_config", config)


def vision_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the part of a model that takes images."""
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


def patch_of(vision: PreTrainedConfig) -> int:
    """Return the side of a patch, in pixels."""
    return _first(vision, "patch_size", default=14)


_GRIDS = ((6, 8), (4, 8))
"""Heights and widths of images, in patches."""


def _side(vision: PreTrainedConfig) -> int:
    return _first(vision, "image_size", default=4 * patch_of(vision))


def _pixels(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of the only size that a model takes."""
    vision = vision_of(config)
    pixels = _random(random, 1, _channels(vision), _side(vision), _side(vision))
    sharper = _vision_named(config, "high_res_vision_config")
    return {
        "pixel_values": pixels,
        "high_res_pixel_values": _random(random, 1, 3, _side(sharper), _side(sharper)),
        "qformer_input_ids": torch.ones(1, 4, dtype=torch.int64),
    }


def _vision_named(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    return getattr(config, name, vision_of(config))


def _frames(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make a video of two frames."""
    vision = vision_of(config)
    return {"pixel_values_videos": _random(random, 1, 2, _channels(vision), _side(vision), _side(vision))}


def _frames_of_a_question(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make a video of two frames with a question to it."""
    frames = _frames(config, size, random)["pixel_values_videos"]
    return {"pixel_values": frames, "qformer_input_ids": torch.ones(1, 4, dtype=torch.int64)}


def _tiles_of_a_row(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of several tiles of a model whose images are listed by rows."""
    vision = vision_of(config)
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
        vision = vision_of(config)
        patch, steps = patch_of(vision), _first(vision, "temporal_patch_size", default=1)
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
    patch = patch_of(vision_of(config))
    height, width = (patch * sides for sides in ((4, 4), (4, 2))[size])
    pixels = _random(random, 1, _channels(vision_of(config)), height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


def _tiled(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image that is cut into tiles, beside a tile with all of it."""
    vision = vision_of(config)
    side = _side(vision)
    height, width = config.image_grid_pinpoints[size]
    tiles = 1 + (height // side) * (width // side)
    pixels = _random(random, 1, tiles, _channels(vision), side, side)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


def _of_patches(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of flattened patches, with a mask of the real ones."""
    vision = vision_of(config)
    patch, (height, width) = patch_of(vision), _GRIDS[size]
    return {
        "pixel_values": _random(random, 1, height * width, _channels(vision) * patch**2),
        "pixel_attention_mask": torch.ones(1, height * width, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[height, width]]),
    }


def _placed(frames: int, names: tuple[str, str]) -> Callable:
    """Return the maker of flattened patches, each with its place."""

    def make(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
        vision = vision_of(config)
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
        vision = vision_of(config)
        patch, (height, width) = patch_of(vision), ((8, 16), (8, 8))[size]
        pixels = _random(random, 1, _channels(vision), patch, patch * height * width)
        return {names[0]: pixels, names[1]: torch.tensor([[height, width]])}

    return make


def _of_a_row(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of a model whose images are listed by rows."""
    side = _side(vision_of(config))
    return {
        "pixel_values": _random(random, 1, 1, 3, side, side),
        "pixel_attention_mask": torch.ones(1, 1, side, side, dtype=torch.bool),
    }


def _tile_of_a_row(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of one or two tiles of a model whose tiles are listed by rows."""
    side = _side(vision_of(config))
    return {
        "pixel_values": _random(random, 1, 2 - size, 3, side, side),
        "pixel_attention_mask": torch.ones(1, 2 - size, dtype=torch.bool),
    }


def _flat_grid(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make flattened patches in a grid of height and width."""
    vision = vision_of(config)
    patch, (height, width) = patch_of(vision), _GRIDS[size]
    return {
        "pixel_values": _random(random, height * width, 3 * patch**2),
        "image_grid_hw": torch.tensor([[height, width]]),
    }


def _all_patches(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make the flattened patches of an image."""
    return {"pixel_values": _random(random, 1, 12, 3 * config.patch_size**2)}


def _pooled(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image whose tokens are pools of patches: 4 of the whole image, and some of its crops."""
    vision = vision_of(config)
    side = _side(vision) // patch_of(vision)
    crops = (2, 1)[size]
    grid = torch.tensor([[2, 2, 2 * (crops - 1), 2]])
    tokens = 4 * crops
    pools = torch.arange(tokens * 4).view(tokens, 4) % (crops * side * side)
    return {
        "pixel_values": _random(random, crops, side * side, 3 * patch_of(vision) ** 2),
        "image_token_pooling": pools,
        "image_grids": grid,
        "image_num_crops": torch.tensor([crops]),
    }


def _blocks(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make an image of blocks of pixels, one for each token."""
    vision = vision_of(config)
    height, width = (side // 2 for side in _GRIDS[size])
    side = patch_of(vision) * vision.spatial_merge_size
    return {
        "pixel_values": _random(random, height * width, side, side, _channels(vision)),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def _pooled_video(config: PreTrainedConfig, size: int, random: torch.Generator) -> Inputs:
    """Make a video of two frames, whose tokens are pools of patches."""
    vision = vision_of(config)
    patches = (_side(vision) // patch_of(vision)) ** 2
    return {
        "pixel_values_videos": _random(random, 2, patches, 3 * patch_of(vision) ** 2),
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
        if config.model_type in SOUND_ALONG:
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
MAKERS: list[tuple[str, str, Callable]] = [
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
