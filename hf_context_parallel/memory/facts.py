"""Facts of a model: the numbers on which its memory and its work depend."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GradientCheckpointingLayer, PreTrainedConfig, PreTrainedModel

from ..compat import widest_layer

LINEAR = "linear_attention"
"""Kind of layers that mix tokens by a state. All other kinds than `full_attention` have a window."""


STORED_BITS = {4: 4.5, 8: 8.0}
"""Bits of a quantised weight in memory, by the bits of bitsandbytes. Blocks of 64 weights in 4 bits share a scale."""


@dataclass(frozen=True)
class ModelFacts:
    """Numbers of a causal language model.

    Args:
        layers: number of decoder layers.
        hidden: width of the hidden states.
        intermediate: width of an MLP, or of an expert.
        heads, key_heads: query heads, and heads of keys and values.
        query_dim, value_dim: dims of a head of queries and keys, and of values.
        vocabulary: number of logits of a token.
        parameters: all parameters; those of LoRA are not among them.
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

    @property
    def full_layers(self) -> int:
        """Layers in which a token reads all tokens before it."""
        return self.layers - self.window_layers - self.linear_layers

    @property
    def trained_parameters(self) -> int:
        """Parameters that have gradients and states of the optimizer."""
        return self.parameters if self.lora_parameters is None else self.lora_parameters


def facts_of(config: PreTrainedConfig, lora_rank: int | None = None, bits: int | None = None) -> ModelFacts:
    """Read the facts of the causal language model of a configuration.

    Its parameters are those of the model, which is made without memory. Nothing is downloaded.

    Args:
        lora_rank: rank of the adapters of all linear layers in decoder layers, the only weights that are then trained.
        bits: bits of the weights of these linear layers, 4 or 8, if bitsandbytes quantises them.

    Raises:
        ValueError: if Transformers has no causal language model of this type, or its layers are not found.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    lora = None if lora_rank is None else lora_rank * sum(map(_lora_dims, layers_of(model)))
    facts = replace(facts_of_model(model), lora_parameters=lora)
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
        head_parameters=0 if head is None else number_of(head),
        tied=head is not None and head is model.get_input_embeddings().weight,
        lora_parameters=trained if trained < parameters else None,
        experts=experts or 0,
        active_experts=_active_experts(text) if experts else 1,
        window=window if of_window else None,
        window_layers=of_window,
        linear_layers=kinds[LINEAR],
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
