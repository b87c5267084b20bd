"""Which modules mix tokens otherwise than by the attention interface, and in which way."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..model_registry import MAKES_POSITIONS, SHORT_CONVOLUTIONS, WHOLE_MODELS, is_called, sees_whole
from .token_functions import CONVOLUTION, SCANS, token_functions


def is_native(module: torch.nn.Module) -> bool:
    """Whether a mixer mixes tokens by functions that it is known how to share, and by nothing else.

    Of such a one each rank computes its share; the others have to see whole sequences.
    """
    called = token_functions(module)
    # Where a state is carried along, the function that does it must be one of them, too.
    return CONVOLUTION in called and (bool(called & SCANS.keys()) or is_called(type(module), SHORT_CONVOLUTIONS))


def mixers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that mix tokens otherwise than by the attention interface, none of them inside another."""
    if isinstance(model, PreTrainedModel) and model.config.model_type in WHOLE_MODELS:
        decoder = model.get_decoder()
        return [model.base_model if decoder is model else decoder]
    found: list[torch.nn.Module] = []
    inside: set[torch.nn.Module] = set()
    for module in model.modules():
        kind = type(module)
        if module not in inside and (sees_whole(kind) or is_called(kind, MAKES_POSITIONS)):
            found.append(module)
            inside.update(module.modules())
    return found


def makes_positions(module: torch.nn.Module) -> bool:
    """Whether a module, or a whole model, makes positions of its own unless it is given some."""
    return isinstance(module, PreTrainedModel) or is_called(type(module), MAKES_POSITIONS)
