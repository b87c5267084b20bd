"""Styles of modules in the tensor-parallel plan of a model."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel


def styles_of(model: PreTrainedModel) -> dict[torch.nn.Module, str]:
    """Return the modules that the tensor-parallel plan of a model names, each with its style.

    The plan may name a module or one of its parameters. If it names both, the style of the parameter counts.
    """
    plan, styles = dict(model.tp_plan or {}), {}
    for name, module in model.named_modules():
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        named = [generic, *(f"{generic}.{parameter}" for parameter, _ in module.named_parameters(recurse=False))]
        for entry in named:
            if entry in plan:
                styles[module] = plan[entry]
    return styles
