"""Which models are known to be exact on shards."""

from __future__ import annotations

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

NAME = "context_parallel"
"""The value of `attn_implementation` that this package registers."""

EXACT = (
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
"""The model types whose every layer has been compared with one process, loss and gradients."""


def check_model(model: torch.nn.Module) -> None:
    """Refuse a model that would not be exact.

    Args:
        model: as the caller has it: wrapped by DDP, FSDP, PEFT or not at all.

    Raises:
        ValueError: naming the type or setting, and what to do.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            break
    else:
        raise ValueError(f"{type(model).__name__} holds no Transformers model; only those can be sharded.")
    check_config(module.config)
    name = type(module).__name__
    causal, base = (mapping[type(module.config)] for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING))
    if not isinstance(module, (causal, base)):
        raise ValueError(
            f"{name} does more with its outputs than predict each next token, and would do it with a shard's. "
            f"Exact are {causal.__name__} and {base.__name__}."
        )
    if isinstance(module, causal) and module.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"{name} has a loss function of its own, {module.loss_function!r}, and it is not known whether that takes "
            "shift_labels and num_items_in_batch. Compute the loss from cp.gather(logits), or leave loss_function "
            "alone."
        )
    if module.config._attn_implementation != NAME:
        raise ValueError(
            f"{name} was loaded with attn_implementation={module.config._attn_implementation!r}; load it with "
            f"attn_implementation={NAME!r}, or call model.set_attn_implementation({NAME!r})."
        )


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a configuration that would not be exact. See `check_model`."""
    if config.model_type not in EXACT:
        raise ValueError(
            f"model type {config.model_type!r} has not been shown to be exact under context parallelism. Exact are "
            f"{', '.join(EXACT)}. If this is one part of a composite model, give each part its own attention, for "
            f'example attn_implementation={{"text_config": "{NAME}", "vision_config": "sdpa"}}.'
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True adds the router's auxiliary loss, which is not a sum over tokens and would be "
            "wrong on a shard. Set config.output_router_logits=False."
        )
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or (config.model_type in ("mistral", "phi3") and config.sliding_window is not None):
        raise ValueError(
            f"sliding_window={config.sliding_window}: sliding windows are not supported yet. Where no document is "
            "longer than the window, it has no effect, and config.sliding_window=None computes the same."
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_type={rope_type!r} chooses its frequencies by the largest position it sees, and each shard sees "
            "another. Use one that does not, such as 'default', 'linear', 'llama3' or 'yarn'."
        )
