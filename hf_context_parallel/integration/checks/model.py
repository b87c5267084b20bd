"""A model that is not known to be exact on shards: its type, its classes, its settings."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...compat import attention_name, base_class_names, causal_lm_classes, causal_lm_loss
from ..model_registry import (
    CHECKED_AS,
    NAME,
    REFUSED,
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
        model: as the caller has it: wrapped by DDP, FSDP, PEFT or not at all.

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
            "(liger, unsloth) give it: what it does with outputs, it would do with a shard's. Exact are the classes "
            "that AutoModelForCausalLM and AutoModel choose, as they are."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder and a decoder, which are given different sequences; the decoder alone is exact, "
            "as AutoModelForCausalLM loads it."
        )
    if stock.__name__ in causal_lm_classes().values() and module.loss_function is not causal_lm_loss():
        raise ValueError(
            f"{name} has a loss function of its own, {module.loss_function!r}, and it is not known whether that takes "
            "shift_labels and num_items_in_batch. Leave loss_function alone, or call the model without labels and "
            "compute the loss from cp.gather(logits)."
        )
    check_tuners(model)
    if model.training:
        _refuse_layer_drop(config)
    attention = attention_name(config.get_text_config())
    if attention != NAME:
        raise ValueError(
            f"{name} was loaded with attn_implementation={attention!r}; load it with attn_implementation={NAME!r}, or "
            f"call model.set_attn_implementation({NAME!r})."
        )


def _stock_class(model: PreTrainedModel) -> type | None:
    """The class that `AutoModelForCausalLM` or `AutoModel` chooses, of which the model is one, if it is."""
    names = base_class_names().union(causal_lm_classes().values())
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.") and kind.__name__ in names:
            return kind
    return None


def _has_forward_of(stock: type, model: PreTrainedModel) -> bool:
    """Whether a model computes what Transformers wrote: neither its class, nor it itself, nor the stock class has
    another forward. Wrappers that say what they wrap, as accelerate's do, are looked through."""
    original = inspect.unwrap(stock.forward)
    if type(model).forward is not stock.forward or not original.__module__.startswith("transformers."):
        return False
    own = inspect.unwrap(own_forward(model))
    return getattr(own, "__func__", own) is original


def _refuse_layer_drop(config: PreTrainedConfig) -> None:
    """Ranks draw on their own, and would skip different layers: those that do not would wait for those that do."""
    for name in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"):
        if getattr(config, name, 0.0):
            raise ValueError(
                f"{type(config).__name__} asks for {name}={getattr(config, name)}, which skips layers at random, on "
                f"each rank others. Set {name}=0.0."
            )


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a configuration that would not be exact. See `check_model`."""
    name = CHECKED_AS.get(config.model_type, config.model_type)
    if name in REFUSED:
        raise ValueError(f"model type {name!r} is refused: {REFUSED[name]}. Call the model outside cp.shard.")
    if not switches.unchecked_models and known_states().get(name, {}).get("state") not in (
        "exact",
        "exact by resharding",
    ):
        reason = known_states().get(name, {}).get("reason") or "it has not been compared with one process"
        raise ValueError(
            f"model type {name!r} is refused: {reason}. `hf-context-parallel check {name}` compares it. If this is "
            f"one part of a composite model, give each part its own attention, as attn_implementation={TEXT_ALONE}."
        )
