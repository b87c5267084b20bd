"""Recognition of mixers, and of those that can run natively."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..model_registry import MAKES_POSITIONS, SHORT_CONVOLUTIONS, WHOLE_MODELS, decoder_of, is_called, sees_whole
from .token_functions import CONVOLUTION, SCANS, token_functions


def is_native(module: torch.nn.Module) -> bool:
    """Return whether a mixer can run natively: it mixes tokens only by functions that ranks can share.

    All other mixers see whole sequences.
    """
    called = token_functions(module)
    # A mixer that carries a state along the sequence must do so by a known scan.
    return CONVOLUTION in called and (bool(called & SCANS.keys()) or is_called(type(module), SHORT_CONVOLUTIONS))


def mixers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that mix tokens by other means than the attention interface. None is inside another."""
    if isinstance(model, PreTrainedModel):
        decoder = decoder_of(model)
        if not WHOLE_MODELS.isdisjoint((model.config.model_type, decoder.config.model_type)):
            return [decoder]
    found: list[torch.nn.Module] = []
    inside: set[torch.nn.Module] = set()
    for module in model.modules():
        kind = type(module)
        if module not in inside and (sees_whole(kind) or is_called(kind, MAKES_POSITIONS)):
            found.append(module)
            inside.update(module.modules())
    return found


def makes_positions(module: torch.nn.Module) -> bool:
    """Return whether a module or a whole model makes its own positions when it is given none."""
    return isinstance(module, PreTrainedModel) or is_called(type(module), MAKES_POSITIONS)
