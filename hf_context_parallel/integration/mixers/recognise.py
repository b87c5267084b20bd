"""Which modules mix tokens otherwise than by the attention interface, and in which way."""

from __future__ import annotations

import re
from functools import cache

import torch
from transformers import PreTrainedModel

from ..model_registry import MAKES_POSITIONS, SEES_WHOLE, SHORT_CONVOLUTIONS, WHOLE_MODELS
from .token_functions import CONVOLUTION, SCANS, token_functions


@cache
def _is_called(kind: type, pattern: re.Pattern) -> bool:
    """Whether a class, or one that it is derived from, has such a name: FSDP2 derives classes of its own."""
    return any(pattern.fullmatch(parent.__name__) for parent in kind.__mro__)


def is_native(module: torch.nn.Module) -> bool:
    """Whether a mixer mixes tokens by functions that it is known how to share, and by nothing else.

    Of such a one each rank computes its share; the others have to see whole sequences.
    """
    called = token_functions(module)
    # Where a state is carried along, the function that does it must be one of them, too.
    return CONVOLUTION in called and (bool(called & SCANS.keys()) or _is_called(type(module), SHORT_CONVOLUTIONS))


def mixers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that mix tokens otherwise than by the attention interface, none of them inside another."""
    if isinstance(model, PreTrainedModel) and model.config.model_type in WHOLE_MODELS:
        decoder = model.get_decoder()
        return [model.base_model if decoder is model else decoder]
    found: list[torch.nn.Module] = []
    inside: set[torch.nn.Module] = set()
    for module in model.modules():
        kind = type(module)
        if module not in inside and (_is_called(kind, SEES_WHOLE) or _is_called(kind, MAKES_POSITIONS)):
            found.append(module)
            inside.update(module.modules())
    return found


def makes_positions(module: torch.nn.Module) -> bool:
    """Whether a module, or a whole model, makes positions of its own unless it is given some."""
    return isinstance(module, PreTrainedModel) or _is_called(type(module), MAKES_POSITIONS)
