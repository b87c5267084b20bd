"""Facts of a vision tower: the numbers on which its memory and its work depend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

ITEM = 4096
"""Patches that an image counts as, where the tower takes images of any size. It is assumed."""


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
        """Compute the cost of an item, in units of `2 * width` products of two numbers.

        A patch costs `2 * width + inner` in a layer, and a pair of patches 1.
        """
        patches = frames * height * width
        return self.layers * patches * (2 * self.width + self.inner) + self.pairs(frames, height, width)


@dataclass(frozen=True)
class TowerFacts:
    """Numbers of a vision tower, with its projector.

    Args:
        sizes: its layers.
        parameters: all parameters of the model outside of its decoder and its head.
        merge: patches that make one token of the decoder.
        heads: heads of its attention.
        numbers: numbers of a patch among the pixels: channels x side x side x frames of a patch.
        item: patches of an image.
        levels: features of a token beside those that take its place: those that DeepStack adds in layers.
        trained: True if its parameters are trained.
        woken: True if gradients run through the tower though it is frozen. `enable_input_require_grads`, which PEFT
            calls, reaches the embeddings of some towers too.
    """

    sizes: TowerSizes
    parameters: int
    merge: int = 1
    heads: int = 16
    numbers: int = 0
    item: int = ITEM
    levels: int = 0
    trained: bool = True
    woken: bool = False


def tower_of(model: PreTrainedModel, parameters: int) -> TowerFacts | None:
    """Read the facts of the vision tower of a model, or return None if it has none.

    Args:
        parameters: those of the model outside of its decoder and its head.
    """
    config, decoder = getattr(model.config, "vision_config", None), set(model.get_decoder().modules())
    outside = [module for module in model.modules() if module not in decoder]
    if config is None or not parameters:
        return None
    patch = _side(config, "patch_size") or 1
    numbers = (_number(config, "in_channels", "num_channels", "in_chans") or 3) * patch**2
    patches = 0 if _number(config, "spatial_merge_size") else ((_side(config, "image_size") or 0) // patch) ** 2
    own = [x for module in outside for x in module.parameters(recurse=False)]
    head = model.get_output_embeddings()
    mine = set(() if head is None else head.parameters())
    return TowerFacts(
        TowerSizes.of(config),
        parameters,
        _merge(model.config, config, patches),
        _number(config, "num_heads", "num_attention_heads") or TowerFacts.heads,
        numbers * (_number(config, "temporal_patch_size") or 1),
        patches or ITEM,
        len(getattr(config, "deepstack_visual_indexes", None) or ()),
        any(x.requires_grad for x in own if x not in mine),
        any(_has_embeddings(module) for module in outside if getattr(module, "config", None) is config),
    )


def _merge(config: Any, tower: Any, patches: int) -> int:
    """Patches that make one token: by the sides of a merged square, or by the tokens of an image of `patches`."""
    side = _number(tower, "spatial_merge_size") or _number(config, "spatial_merge_size")
    tokens = _number(config, "mm_tokens_per_image", "image_seq_length", "image_seq_len")
    return side**2 if side else max(1, patches // tokens) if tokens else 1


def _side(config: Any, name: str) -> int | None:
    """Return the first side of a size that is one number or several."""
    value = getattr(config, name, None)
    return value[0] if isinstance(value, (list, tuple)) else _number(config, name)


def _has_embeddings(module: torch.nn.Module) -> bool:
    """Return whether `enable_input_require_grads` finds embeddings of a module."""
    if not isinstance(module, PreTrainedModel):
        return False
    try:
        return isinstance(module.get_input_embeddings(), torch.nn.Module)
    except NotImplementedError:  # as models raise that have none
        return False


def _squares(length: int, side: int) -> int:
    """Sum the squares of the lengths of pieces of a side."""
    whole, rest = divmod(length, side)
    return whole * side**2 + rest**2


def _number(config: Any, *names: str) -> int | None:
    """Return the first field with one of these names that is a number, or None."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
