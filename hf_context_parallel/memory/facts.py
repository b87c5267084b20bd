"""Facts of a model: the numbers on which its memory and its work depend."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GradientCheckpointingLayer,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..compat import widest_layer
from .tower_facts import TowerFacts, tower_of

LINEAR = "linear_attention"
"""Kind of layers that mix tokens by a state. All other kinds than `full_attention` have a window."""


STORED_BITS = {4: 4.5, 8: 8.0}
"""Bits of a quantised weight in memory, by the bits of bitsandbytes. Blocks of 64 weights in 4 bits share a scale."""
_TEXT = (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING)
_IMAGES = (
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)
"""Classes that make a model of a configuration, with the types that they know."""


@dataclass(frozen=True)
class ModelFacts:
    """Numbers of a causal language model, alone or with towers.

    Args:
        layers: number of decoder layers.
        hidden: width of the hidden states.
        intermediate: width of an MLP, or of an expert.
        heads, key_heads: query heads, and heads of keys and values.
        query_dim, value_dim: dims of a head of queries and keys, and of values.
        vocabulary: number of logits of a token.
        parameters: all parameters, those of towers included; those of LoRA are not among them.
        layer_parameters: parameters of the largest layer.
        head_parameters: parameters of the output embeddings.
        tied: True if the output embeddings are the input embeddings too.
        lora_parameters: trained parameters, if only adapters are trained.
        experts: experts of a layer, 0 for a dense MLP.
        active_experts: experts that compute a token, the shared one included; 1 for a dense MLP.
        window: most tokens that a token of a window or chunk layer reads, or None if no layer has one.
        window_layers, linear_layers: layers with a window or chunks, and layers that mix tokens by a state.
        quantized_parameters: those of linear layers in decoder layers, if they are frozen and quantised.
        quantized_bits: bits of each of these in memory.
        dequantized: parameters of the largest of these layers, which is made in full precision to be used.
        tower: the vision tower, or None.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    query_dim: int
    value_dim: int
    vocabulary: int
    parameters: int
    layer_parameters: int
    head_parameters: int
    tied: bool = False
    lora_parameters: int | None = None
    experts: int = 0
    active_experts: int = 1
    window: int | None = None
    window_layers: int = 0
    linear_layers: int = 0
    quantized_parameters: int = 0
    quantized_bits: float = 0.0
    dequantized: int = 0
    tower: TowerFacts | None = None

    @property
    def full_layers(self) -> int:
        """Layers in which a token reads all tokens before it."""
        return self.layers - self.window_layers - self.linear_layers

    @property
    def trained_parameters(self) -> int:
        """Parameters that have gradients and states of the optimizer."""
        if self.lora_parameters is not None:
            return self.lora_parameters
        return self.parameters - (self.tower_parameters - self.trained_of_tower)

    @property
    def tower_parameters(self) -> int:
        """Parameters of the vision tower and its projector."""
        return 0 if self.tower is None else self.tower.parameters

    @property
    def trained_of_tower(self) -> int:
        """Those of them that are trained."""
        return self.tower_parameters if self.tower is not None and self.tower.trained else 0


def has_images(config: PreTrainedConfig) -> bool:
    """Return whether Transformers makes a model with a vision tower of a configuration."""
    return hasattr(config, "vision_config") and any(type(config) in known for _, known in _IMAGES)


def facts_of(
    config: PreTrainedConfig, lora_rank: int | None = None, bits: int | None = None, images: bool = False
) -> ModelFacts:
    """Read the facts of the causal language model of a configuration.

    Its parameters are those of the model, which is made without memory. Nothing is downloaded.

    Args:
        lora_rank: rank of the adapters of all linear layers in decoder layers, the only weights that are then trained.
        bits: bits of the weights of these linear layers, 4 or 8, if bitsandbytes quantises them.
        images: True for the model with its towers, where both are there. A model that is there with its towers alone
            is taken with them in either case.

    Raises:
        ValueError: if Transformers has no language model of this type, or its layers are not found.
    """
    ways = (*_IMAGES, _TEXT) if images else (_TEXT, *_IMAGES)
    text = config.get_text_config(decoder=True)
    found = [(way, each) for each in (config, text) for way, known in ways if type(each) in known]
    if not found:
        raise ValueError(
            f"Transformers has no language model of type {config.model_type!r}. Give a model that it has."
        )
    way, config = found[0]
    with torch.device("meta"):
        model = way.from_config(config)
    facts = facts_of_model(model)
    if lora_rank is not None:
        lora = lora_rank * sum(map(_lora_dims, layers_of(model)))
        tower = None if facts.tower is None else replace(facts.tower, trained=False)
        facts = replace(facts, lora_parameters=lora, tower=tower)
    if bits is None:
        return facts
    sizes = [linear.weight.numel() for layer in layers_of(model) for linear in _linear(layer)]
    return replace(
        facts, quantized_parameters=sum(sizes), quantized_bits=STORED_BITS[bits], dequantized=max(sizes, default=0)
    )


def facts_of_model(model: PreTrainedModel) -> ModelFacts:
    """Read the facts of a model. Without a language-model head, its vocabulary is 1.

    Raises:
        ValueError: if its layers are not found.
    """
    layers = layers_of(model)
    text = widest_layer(model.config.get_text_config(decoder=True))
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    latent = getattr(text, "kv_lora_rank", None) is not None  # keys of every query head are made from a latent
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    kinds = Counter(getattr(text, "layer_types", None) or ())
    of_window = sum(count for kind, count in kinds.items() if kind not in ("full_attention", LINEAR))
    window = _first(text, "sliding_window", "attention_chunk_size")
    if not kinds and window and getattr(text, "use_sliding_window", True):
        of_window = len(layers)
    head = getattr(model.get_output_embeddings(), "weight", None)
    parameters, trained = _count(model), _count(model, trained=True)
    tied = head is not None and head is model.get_input_embeddings().weight
    head_parameters = 0 if head is None else number_of(head)
    of_text = _count(model.get_decoder()) + (0 if tied else head_parameters)
    tower = tower_of(model, parameters - of_text)
    frozen = 0 if tower is None or tower.trained else tower.parameters
    return ModelFacts(
        layers=len(layers),
        hidden=text.hidden_size,
        intermediate=(experts and _first(text, "moe_intermediate_size"))
        or _first(text, "intermediate_size")
        or 4 * text.hidden_size,  # where Transformers takes as much, as in GPT-2
        heads=heads,
        key_heads=heads if latent else getattr(text, "num_key_value_heads", None) or heads,
        query_dim=text.qk_nope_head_dim + text.qk_rope_head_dim if latent else head_dim,
        value_dim=text.v_head_dim if latent else head_dim,
        vocabulary=text.vocab_size if head is not None else 1,
        parameters=parameters,
        layer_parameters=max(map(_count, layers)),
        head_parameters=head_parameters,
        tied=tied,
        lora_parameters=trained if trained < parameters - frozen else None,
        experts=experts or 0,
        active_experts=_active_experts(text) if experts else 1,
        window=window if of_window else None,
        window_layers=of_window,
        linear_layers=kinds[LINEAR],
        tower=tower,
    )


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """List the decoder layers: the longest list of layers that can be checkpointed.

    Raises:
        ValueError: if there is none.
    """
    decoder = model.get_decoder()  # that of ModernBERT is a layer of the head
    root = decoder if isinstance(decoder, PreTrainedModel) else model
    lists = [x for x in root.modules() if isinstance(x, torch.nn.ModuleList)]
    layers = max((x for x in lists if all(isinstance(y, GradientCheckpointingLayer) for y in x)), key=len, default=())
    if not len(layers):
        raise ValueError(
            f"{type(model).__name__} has no list of layers that Transformers can checkpoint. Give a model with such "
            "layers, such as Llama."
        )
    return list(layers)


def number_of(parameter: torch.nn.Parameter) -> int:
    """Return the numbers of a whole parameter. DeepSpeed keeps a part of it, and notes how many there were."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def _count(module: torch.nn.Module, trained: bool = False) -> int:
    return sum(number_of(parameter) for parameter in module.parameters() if parameter.requires_grad or not trained)


def _lora_dims(layer: torch.nn.Module) -> int:
    """Sum of inputs and outputs of the linear layers of a layer."""
    return sum(module.in_features + module.out_features for module in _linear(layer))


def _linear(layer: torch.nn.Module) -> list[torch.nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]


def _active_experts(text: Any) -> int:
    shared = _first(text, "n_shared_experts", "num_shared_experts") or 0
    return (_first(text, "num_experts_per_tok", "top_k_experts", "moe_topk") or 1) + shared


def _first(text: Any, *names: str) -> int | None:
    """Value of the first of these fields that a configuration has."""
    return next((value for name in names if (value := getattr(text, name, None)) is not None), None)
