"""Tiny models of real architectures, with random weights that are the same in every process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

import hf_context_parallel as hcp

VOCABULARY = 64
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_OWN = {
    "gpt2": {
        **_TOKENS,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "gpt_neox": {**_COMMON, "num_key_value_heads": 4},
    "mistral": {**_COMMON, "sliding_window": None},
    "phi3": {**_COMMON, "sliding_window": None, "original_max_position_embeddings": 256},
    "qwen3": {**_COMMON, "head_dim": 12},
    "qwen3_moe": {
        **_COMMON,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}


def tiny_config(model_type: str, **changes):
    """The configuration of a model of this type that fits anywhere."""
    return AutoConfig.for_model(model_type, **{**_OWN.get(model_type, _COMMON), **changes})


def tiny_model(model_type: str, attention: str | None, dtype: torch.dtype = torch.float64, **changes):
    """A model of this type, the same for every value of `attention`.

    Weights are spread out, so that attention is not uniform and norms and biases are not those of a fresh model.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), attn_implementation=attention)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default, a grouped matrix product, does not take float64
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def context(**settings) -> hcp.ContextParallel:
    """Context parallelism over all ranks of the process group, or over this process alone."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    return hcp.ContextParallel(hcp.ContextParallelConfig(size=size, **settings))


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids `[rows, length]`, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def some_labels(input_ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Labels of a third of the tokens."""
    draw = torch.rand(input_ids.shape, generator=torch.Generator().manual_seed(seed))
    return input_ids.masked_fill(draw > 1 / 3, -100)


def document_positions(*lengths: int) -> torch.Tensor:
    """Position ids `[1, sum]` of documents packed one after another."""
    return torch.cat([torch.arange(length) for length in lengths])[None]
