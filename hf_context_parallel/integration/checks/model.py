"""Checks of a model before it runs on shards: its type, its class, its settings."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...compat import attention_name, base_class_names, causal_lm_classes, causal_lm_loss
from ...cp_group import CPGroup
from ..model_registry import (
    CHECKED_AS,
    NAME,
    REFUSED,
    REFUSED_SETTINGS,
    TEXT_ALONE,
    is_decided,
    known_decoders,
    known_states,
    transformers_model,
)
from ..patches.module_patch import inside_patches
from ..switches import switches
from .inputs import check_decoder_inputs
from .peft import check_adapters, check_tuners
from .proofs import Unproven, is_proven

WRAPPERS = ("accelerate", "torch", "transformers")
"""Packages whose wrappers around a forward do not change its results."""


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
    stock = stock_class(module, base_class_names().union(causal_lm_classes().values()))
    if stock is None or not has_forward_of(stock, module):
        raise ValueError(
            f"{name} is not one of Transformers' causal language models, or has a forward of its own, as fused losses "
            "(liger, unsloth) give it, and that would run on the outputs of a shard. Use a class that "
            "AutoModelForCausalLM or AutoModel chooses, with its forward unchanged."
        )
    _refuse_encoder_decoder(module)
    if stock.__name__ in causal_lm_classes().values() and module.loss_function is not causal_lm_loss():
        raise ValueError(
            f"{name} has a loss function of its own, {module.loss_function!r}, which may not use shift_labels and "
            "num_items_in_batch. Leave loss_function unchanged, or call the model without labels and compute the loss "
            "from cp.gather(logits)."
        )
    check_tuners(model)
    if model.training:
        _refuse_layer_drop(config)
    _check_attention(module, config.get_text_config())


def _refuse_encoder_decoder(model: PreTrainedModel) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder and a decoder, which read different sequences, and the decoder "
            "alone is exact. Load the decoder with AutoModelForCausalLM."
        )


def _check_attention(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Refuse a model whose text configuration names another attention."""
    attention = attention_name(config)
    if attention != NAME:
        raise ValueError(
            f"{type(model).__name__} was loaded with attn_implementation={attention!r}. Load it with "
            f"attn_implementation={NAME!r}, or call model.set_attn_implementation({NAME!r})."
        )


def stock_class(model: PreTrainedModel, names: Container[str] | None = None) -> type | None:
    """Return the class of a model, or a base of it, that Transformers wrote, or None.

    Args:
        names: the names that the class may have; None for all.
    """
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models.") and (names is None or kind.__name__ in names):
            return kind
    return None


def has_forward_of(stock: type, model: PreTrainedModel) -> bool:
    """Return whether the model runs the forward that Transformers wrote.

    The model, its class and the stock class must all have that forward. Wrappers of accelerate, torch and Transformers
    may lie around it. Any other wrapper may do more than calling it, whatever it says by `__wrapped__`.
    """
    original = _unwrapped(stock.forward)
    if type(model).forward is not stock.forward or not _package(original).startswith("transformers.models."):
        return False
    return _unwrapped(model.forward) is original


def _unwrapped(function: Callable) -> Any:
    """Return the function inside of the wrappers of accelerate, torch, Transformers and this package."""
    while True:
        function = inside_patches(function)
        function = getattr(function, "__func__", function)
        if not hasattr(function, "__wrapped__") or _package(function).split(".")[0] not in WRAPPERS:
            return function
        function = function.__wrapped__


def _package(function: Any) -> str:
    """Return the module that holds the code of a function. `__module__` is copied by `functools.wraps`."""
    return getattr(function, "__globals__", {}).get("__name__", type(function).__module__)


def check_decoder(decoder: PreTrainedModel, outermost: PreTrainedModel) -> None:
    """Refuse a model whose decoder would not be exact on shards. What lies around the decoder sees whole batches.

    Args:
        decoder: the module that holds all layers that mix tokens.
        outermost: the Transformers model around it, or the decoder itself.

    Raises:
        ValueError: naming the type or setting, and what to do.
        Unproven: if the model is in no table and has not been compared.
    """
    _refuse_encoder_decoder(outermost)
    types = dict.fromkeys(CHECKED_AS.get(x.config.model_type, x.config.model_type) for x in (decoder, outermost))
    known = [name for name in types if name in REFUSED or is_decided(name)]
    for model in (decoder, outermost):
        if CHECKED_AS.get(model.config.model_type, model.config.model_type) in known:
            check_config(model.config, known_decoders())
    _check_attention(decoder, decoder.config)
    stock = stock_class(decoder)
    if not known:
        what = f"model type {decoder.config.model_type!r} is in no table of this package"
    elif stock is None or not has_forward_of(stock, decoder):
        what = f"{type(decoder).__name__} is no model of Transformers, or has a forward of its own"
    else:
        return
    if not switches.unchecked_models and not is_proven(decoder):
        raise Unproven(
            f"{what}, and it has not been compared with itself on whole sequences. Call "
            "hf_context_parallel.verify(model, cp), which compares it and keeps the result, run `hf-context-parallel "
            "check`, or train it by ContextParallelTrainer, which compares it before the first step."
        )


def check_call(decoder: PreTrainedModel, outer: PreTrainedModel, given: Mapping[str, Any], group: CPGroup) -> None:
    """Refuse a call of a decoder that would not be exact on shards.

    Args:
        decoder: the decoder.
        outer: the model around it that was called, or the decoder itself.
        given: the arguments of the call of the decoder by name.

    Raises:
        ValueError: naming the setting or the argument, and what to do.
    """
    for model in {decoder, outer}:
        check_adapters(model)
    if decoder.training:
        _refuse_layer_drop(decoder.config)
    group.config.check_layers(getattr(decoder.config, "num_hidden_layers", None))
    if given.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: no rank holds the attention weights of whole sequences. Leave it out, or run the "
            "model in `with cp.whole(model):`."
        )
    check_decoder_inputs(decoder.config, given, group)


def _refuse_layer_drop(config: PreTrainedConfig) -> None:
    """Refuse LayerDrop: each rank would skip other layers, and ranks that run a layer would wait for the others."""
    for name in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"):
        if getattr(config, name, 0.0):
            raise ValueError(
                f"{type(config).__name__} asks for {name}={getattr(config, name)}, which skips random layers, and "
                f"other ones on each rank. Set {name}=0.0."
            )


def check_config(config: PreTrainedConfig, known: dict[str, dict] | None = None) -> None:
    """Refuse a configuration whose model would not be exact; see `check_model`.

    Args:
        known: results of types; those of language models unless given.
    """
    known = known_states() if known is None else known
    name = CHECKED_AS.get(config.model_type, config.model_type)
    if name in REFUSED:
        raise ValueError(f"model type {name!r} is refused: {REFUSED[name]}. Train it without context parallelism.")
    for (model_type, field, value), reason in REFUSED_SETTINGS.items():
        if name == model_type and getattr(config, field) == value:
            raise ValueError(
                f"model type {name!r} is refused with {field}={value}: {reason}. Set another value, or train it "
                "without context parallelism."
            )
    if not switches.unchecked_models and known.get(name, {}).get("state") not in (
        "exact",
        "exact by resharding",
    ):
        reason = known.get(name, {}).get("reason") or "it has not been compared with one process"
        raise ValueError(
            f"model type {name!r} is refused: {reason}. Run `hf-context-parallel check {name}` to compare it. If this "
            f"is a part of a composite model, give each part its own attention: attn_implementation={TEXT_ALONE}."
        )
