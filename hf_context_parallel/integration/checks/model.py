"""Checks of a model before it runs on shards: its type, its class, its settings."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...compat import attention_name, base_class_names, causal_lm_classes, causal_lm_loss
from ..model_registry import (
    CHECKED_AS,
    NAME,
    REFUSED,
    REFUSED_SETTINGS,
    TEXT_ALONE,
    known_states,
    transformers_model,
)
from ..patches.module_patch import own_forward
from ..switches import switches
from .peft import check_tuners


def check_model(model: torch.nn.Module) -> None:
    """Refuse a model that would not be exact.

    Args:
        model: the model of the caller. It may be wrapped by DDP, FSDP or PEFT.

    Raises:
        ValueError: naming the type or setting, and what to do.
    """
    module = transformers_model(model)
    config, name = module.config, type(module).__name__
    check_config(config)
    stock = _stock_class(module)
    if stock is None or not _has_forward_of(stock, module):
        raise ValueError(
            f"{name} is not one of Transformers' causal language models, or has a forward of its own, as fused losses "
            "(liger, unsloth) give it, and that would run on the outputs of a shard. Use a class that "
            "AutoModelForCausalLM or AutoModel chooses, with its forward unchanged."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder and a decoder, which read different sequences, and the decoder alone is exact. "
            "Load the decoder with AutoModelForCausalLM."
        )
    if stock.__name__ in causal_lm_classes().values() and module.loss_function is not causal_lm_loss():
        raise ValueError(
            f"{name} has a loss function of its own, {module.loss_function!r}, which may not use shift_labels and "
            "num_items_in_batch. Leave loss_function unchanged, or call the model without labels and compute the loss "
            "from cp.gather(logits)."
        )
    check_tuners(model)
    if model.training:
        _refuse_layer_drop(config)
    attention = attention_name(config.get_text_config())
    if attention != NAME:
        raise ValueError(
            f"{name} was loaded with attn_implementation={attention!r}. Load it with attn_implementation={NAME!r}, or "
            f"call model.set_attn_implementation({NAME!r})."
        )


def _stock_class(model: PreTrainedModel) -> type | None:
    """Return the class of the model, or a base of it, that `AutoModelForCausalLM` or `AutoModel` chooses, or None."""
    names = base_class_names().union(causal_lm_classes().values())
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.") and kind.__name__ in names:
            return kind
    return None


def _has_forward_of(stock: type, model: PreTrainedModel) -> bool:
    """Return whether the model runs the forward that Transformers wrote.

    The model, its class and the stock class must all have that forward. A wrapper may lie around it if it sets
    `__wrapped__`, as the one of accelerate does.
    """
    original = inspect.unwrap(stock.forward)
    if type(model).forward is not stock.forward or not original.__module__.startswith("transformers."):
        return False
    own = inspect.unwrap(own_forward(model))
    return getattr(own, "__func__", own) is original


def _refuse_layer_drop(config: PreTrainedConfig) -> None:
    """Refuse LayerDrop: each rank would skip other layers, and ranks that run a layer would wait for the others."""
    for name in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"):
        if getattr(config, name, 0.0):
            raise ValueError(
                f"{type(config).__name__} asks for {name}={getattr(config, name)}, which skips random layers, and "
                f"other ones on each rank. Set {name}=0.0."
            )


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a configuration whose model would not be exact; see `check_model`."""
    name = CHECKED_AS.get(config.model_type, config.model_type)
    if name in REFUSED:
        raise ValueError(f"model type {name!r} is refused: {REFUSED[name]}. Call the model outside cp.shard.")
    for (model_type, field, value), reason in REFUSED_SETTINGS.items():
        if name == model_type and getattr(config, field) == value:
            raise ValueError(
                f"model type {name!r} is refused with {field}={value}: {reason}. Set another value, or call the model "
                "outside cp.shard."
            )
    if not switches.unchecked_models and known_states().get(name, {}).get("state") not in (
        "exact",
        "exact by resharding",
    ):
        reason = known_states().get(name, {}).get("reason") or "it has not been compared with one process"
        raise ValueError(
            f"model type {name!r} is refused: {reason}. Run `hf-context-parallel check {name}` to compare it. If this "
            f"is a part of a composite model, give each part its own attention: attn_implementation={TEXT_ALONE}."
        )
