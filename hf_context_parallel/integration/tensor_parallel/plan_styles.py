"""The styles that a model's tensor-parallel plan gives to its modules."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel


def styles_of(model: PreTrainedModel) -> dict[torch.nn.Module, str]:
    """The modules that the model's tensor-parallel plan names, or of which it names a parameter, each with its style.

    Of these, the style of a parameter is what counts.
    """
    plan, styles = dict(model.tp_plan or {}), {}
    for name, module in model.named_modules():
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        named = [generic, *(f"{generic}.{parameter}" for parameter, _ in module.named_parameters(recurse=False))]
        for entry in named:
            if entry in plan:
                styles[module] = plan[entry]
    return styles
