"""Names of Transformers that it does not document, and what differs between its versions from 5.17 on.

Nothing is looked up on import. A version that lacks a name refuses what needs it, and nothing else.
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
    """The object that a module of Transformers has under an undocumented name.

    Args:
        module: below `transformers`.
        needed_by: what cannot be computed without it, for the message.

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
    """For each model type, the name of the class that `AutoModelForCausalLM` makes of it."""
    return lookup("models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "every model type")


@functools.cache
def base_class_names() -> frozenset[str]:
    """The names of the classes that `AutoModel` chooses from."""
    by_type = lookup("models.auto.modeling_auto", "MODEL_MAPPING_NAMES", "every model type")
    several = ((names,) if isinstance(names, str) else names for names in by_type.values())
    return frozenset(name for names in several for name in names)


def causal_lm_loss() -> Callable:
    """The loss function that causal language models have unless they bring one of their own."""
    return lookup("loss.loss_utils", "ForCausalLMLoss", "the loss of every model type")


def mask_piece(name: str) -> Callable:
    """One of the functions that Transformers puts masks together from."""
    return lookup("masking_utils", name, "a model type that sees whole sequences")


def chunks_count_from_documents() -> bool:
    """Whether chunked attention counts its chunks from each packed document's first token: from 5.18 on."""
    return hasattr(importlib.import_module("transformers.masking_utils"), "remap_positions_for_packed_sequence")


def bloom_alibi() -> Callable:
    """The function that makes Bloom's score biases of a padding mask."""
    return lookup("models.bloom.modeling_bloom", "build_alibi_tensor", "model type 'bloom'")


def attention_name(config: PreTrainedConfig) -> str | None:
    """The value of `attn_implementation` that a configuration was given."""
    return getattr(config, "_attn_implementation", None)


def set_attention_name(config: PreTrainedConfig, name: str) -> None:
    """Give this configuration alone another `attn_implementation`, and none of its parts."""
    config._attn_implementation_internal = name


def default_attention(model_class: type[PreTrainedModel]) -> str:
    """`"sdpa"` or `"eager"`: the attention that Transformers chooses for a class."""
    return "sdpa" if model_class._supports_sdpa else "eager"


def asks_interface(module_class: type[torch.nn.Module]) -> bool:
    """Whether a module's forward looks its attention up in the interface: GPT-J and CodeGen do from 5.24 on."""
    forward = inspect.unwrap(module_class.forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def add_to_attention_tables(
    name: str, known: Callable[[type], bool], refuse: Callable[[PreTrainedConfig, str], Exception]
) -> None:
    """Enter `name` in the tables by which some model types choose the class of their attention.

    Such a type asks no interface. Its tables are filled when a model of it is made with `name`: in the constructor
    that all models share, since Transformers has no hook before the layers are made.

    Args:
        known: whether the class of a table's eager attention may be taken for `name` as well.
        refuse: makes the error of any other table, of the configuration and the table's name.
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
