"""Which models are known to be exact on shards."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

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
            check_config(module.config)
            if module.config._attn_implementation != NAME:
                raise ValueError(
                    f"{type(module).__name__} was loaded with attn_implementation="
                    f"{module.config._attn_implementation!r}; load it with attn_implementation={NAME!r}, or call "
                    f"model.set_attn_implementation({NAME!r})."
                )
            return
    raise ValueError(f"{type(model).__name__} holds no Transformers model; only those can be sharded.")


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
