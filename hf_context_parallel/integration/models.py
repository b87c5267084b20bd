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
    config, name = module.config, type(module).__name__
    check_config(config)
    causal, base = (mapping.get(type(config), None) for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING))
    if causal is None or type(module).forward not in (causal.forward, base.forward):
        raise ValueError(
            f"{name} is not one of Transformers' causal language models, or has a forward of its own: what it does "
            "with outputs, it would do with a shard's. Exact are the classes that AutoModelForCausalLM and AutoModel "
            "choose."
        )
    if type(module).forward is causal.forward and module.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"{name} has a loss function of its own, {module.loss_function!r}, and it is not known whether that takes "
            "shift_labels and num_items_in_batch. Leave loss_function alone, or call the model without labels and "
            "compute the loss from cp.gather(logits)."
        )
    if model.training:
        _refuse_dropout(model, config)
    if config._attn_implementation != NAME:
        raise ValueError(
            f"{name} was loaded with attn_implementation={config._attn_implementation!r}; load it with "
            f"attn_implementation={NAME!r}, or call model.set_attn_implementation({NAME!r})."
        )


def _refuse_dropout(model: torch.nn.Module, config: PreTrainedConfig) -> None:
    """Ranks are seeded alike, so they would drop the same entries of different tokens."""
    attention = getattr(config, "attention_dropout", 0.0)
    if attention:
        raise ValueError(
            f"{type(config).__name__} asks for attention dropout of {attention}, which is not supported: set "
            "attention_dropout=0.0."
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.training and module.p > 0:
            raise ValueError(
                f"{name} drops out with p={module.p}, which is not supported: set the probability that the model's "
                "config (or the adapter's) has for it to 0.0."
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
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type in ("mistral", "phi3") and window is not None
    ):
        raise ValueError(
            f"the model has layers with a sliding window (sliding_window={window}), which are not supported yet. "
            "Where no document is longer than the window, a config with full attention in all layers computes the "
            "same."
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_type={rope_type!r} chooses its frequencies by the largest position it sees, and each shard sees "
            "another. Use one that does not, such as 'default', 'linear', 'llama3' or 'yarn'."
        )
