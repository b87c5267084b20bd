"""Undocumented names of Transformers, and differences between its versions from 5.17 on.

Nothing is looked up on import. If a version lacks a name, only the model types that need it are refused.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel


def lookup(module: str, name: str, needed_by: str) -> Any:
    """Look up an undocumented name of Transformers.

    Args:
        module: path of the module below `transformers`.
        name: the name in this module.
        needed_by: subject of the message, such as a model type that cannot run without it.

    Raises:
        ValueError: if the installed version does not have it.
    """
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Transformers {transformers.__version__} has no {name} in transformers.{module}, and {needed_by} needs "
            "it. Install the version of Transformers that docs/models.md names."
        ) from error


def causal_lm_classes() -> dict[str, str]:
    """Return the class names that `AutoModelForCausalLM` chooses from, by model type."""
    return lookup("models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "every model type")


@functools.cache
def base_class_names() -> frozenset[str]:
    """Return the class names that `AutoModel` chooses from."""
    by_type = lookup("models.auto.modeling_auto", "MODEL_MAPPING_NAMES", "every model type")
    several = ((names,) if isinstance(names, str) else names for names in by_type.values())
    return frozenset(name for names in several for name in names)


def causal_lm_loss() -> Callable:
    """Return the default loss function of causal language models."""
    return lookup("loss.loss_utils", "ForCausalLMLoss", "the loss of every model type")


def mask_piece(name: str) -> Callable:
    """Return one of the functions from which Transformers builds masks."""
    return lookup("masking_utils", name, "a model type that sees whole sequences")


def chunks_count_from_documents() -> bool:
    """Return whether chunked attention counts chunks from the start of each packed document, as from 5.18 on."""
    return hasattr(importlib.import_module("transformers.masking_utils"), "remap_positions_for_packed_sequence")


def bloom_alibi() -> Callable:
    """Return the function that makes the score biases of Bloom from a padding mask."""
    return lookup("models.bloom.modeling_bloom", "build_alibi_tensor", "model type 'bloom'")


def attention_name(config: PreTrainedConfig) -> str | None:
    """Return the value of `attn_implementation` of a configuration."""
    return getattr(config, "_attn_implementation", None)


def set_attention_name(config: PreTrainedConfig, name: str) -> None:
    """Set the `attn_implementation` of a configuration, and not of the configurations inside it."""
    config._attn_implementation_internal = name


def default_attention(model_class: type[PreTrainedModel]) -> str:
    """Return `"sdpa"` or `"eager"`: the default attention of Transformers for a model class."""
    return "sdpa" if model_class._supports_sdpa else "eager"


def asks_interface(module_class: type[torch.nn.Module]) -> bool:
    """Return whether the forward of a module uses the attention interface. GPT-J and CodeGen do from 5.24 on."""
    forward = inspect.unwrap(module_class.forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def add_to_attention_tables(
    name: str, known: Callable[[type], bool], refuse: Callable[[PreTrainedConfig, str], Exception]
) -> None:
    """Add `name` to the tables from which some model types choose the class of their attention.

    Such a type does not use the attention interface. Its tables are filled when a model is made with `name`. That is
    done in the constructor that all models share, since Transformers has no hook before the layers are made.

    Args:
        name: the value of `attn_implementation`.
        known: returns whether the eager attention class of a table may be used for `name` too.
        refuse: makes the error for any other table, from the configuration and the name of the table.
    """
    original = PreTrainedModel.__init__

    @functools.wraps(original)
    def init(self, config, *args, **kwargs):
        if attention_name(config) == name:
            for module in {kind.__module__ for kind in type(self).__mro__}:
                _fill_tables(sys.modules[module], name, known, refuse)
        original(self, config, *args, **kwargs)

    PreTrainedModel.__init__ = init


def _fill_tables(
    module: ModuleType,
    name: str,
    known: Callable[[type], bool],
    refuse: Callable[[PreTrainedConfig, str], Exception],
) -> None:
    for table_name, table in vars(module).items():
        if table_name.endswith("ATTENTION_CLASSES") and isinstance(table, MutableMapping) and "eager" in table:
            table.setdefault(name, table["eager"] if known(table["eager"]) else _refusal(refuse, table_name))


def _refusal(refuse: Callable[[PreTrainedConfig, str], Exception], table_name: str) -> Callable:
    def make(config: PreTrainedConfig, *args, **kwargs):
        raise refuse(config, table_name)

    return make
