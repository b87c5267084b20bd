"""Tuners of PEFT that training runs are compared with, by the words of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

MODULES = ["q_proj", "v_proj", "down_proj"]


def _on_modules(config: Callable[..., peft.PeftConfig], **options: Any) -> Callable[[], peft.PeftConfig]:
    """Return a function that makes a configuration of some modules."""
    return lambda: config(**{"task_type": "CAUSAL_LM", "target_modules": MODULES, **options})


TUNERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": _on_modules(peft.LoraConfig, r=4),
    "LoRA, `all-linear`": _on_modules(peft.LoraConfig, r=4, target_modules="all-linear"),
    "LoRA, embeddings and head": _on_modules(peft.LoraConfig, r=4, target_modules=["embed_tokens", "lm_head"]),
    "LoRA, `modules_to_save`": _on_modules(peft.LoraConfig, r=4, modules_to_save=["embed_tokens", "lm_head"]),
    "LoRA, `trainable_token_indices`": _on_modules(peft.LoraConfig, r=4, trainable_token_indices=[3, 40, 41]),
    "rsLoRA": _on_modules(peft.LoraConfig, r=4, use_rslora=True),
    "DoRA": _on_modules(peft.LoraConfig, r=4, use_dora=True),
    "LoRA of experts (`target_parameters`)": _on_modules(
        peft.LoraConfig, r=4, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "AdaLoRA": _on_modules(peft.AdaLoraConfig, init_r=6, target_r=4, total_step=10),
    "IA3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LayerNorm tuning": _on_modules(peft.LNTuningConfig, target_modules=["input_layernorm", "norm"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 40, 41]),
    "VeRA": _on_modules(peft.VeraConfig, r=4, target_modules=["q_proj", "o_proj"]),
    "OFT": _on_modules(peft.OFTConfig, oft_block_size=4),
    "BOFT": _on_modules(peft.BOFTConfig, boft_block_size=4),
    "LoHa": _on_modules(peft.LoHaConfig, r=4),
    "LoKr": _on_modules(peft.LoKrConfig, r=4),
    "FourierFT": _on_modules(peft.FourierFTConfig, n_frequency=20),
    "MiSS": _on_modules(peft.MissConfig, r=4),
    "HRA": _on_modules(peft.HRAConfig, r=4),
    "RandLoRA": _on_modules(peft.RandLoraConfig, r=4),
    "SHiRA": _on_modules(peft.ShiraConfig, r=4),
    "VB-LoRA": _on_modules(peft.VBLoRAConfig, vector_length=8, num_vectors=16),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix tuning (whole on every rank)": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5
    ),
    "aLoRA": _on_modules(peft.LoraConfig, r=4, alora_invocation_tokens=[3, 4]),
    "Lily": _on_modules(peft.LilyConfig),
    "LoRA, `velora_config` of batch averages": _on_modules(
        peft.LoraConfig, r=4, velora_config=peft.VeloraConfig(num_groups=4)
    ),
    "LoHa, `module_dropout`": _on_modules(peft.LoHaConfig, r=4, module_dropout=0.1),
}
REFUSED_BY_TRL = ("LoRA, embeddings and head",)
"""Tuners that the trainers of TRL refuse. They run with the Trainer of Transformers."""
REFUSED = {
    "aLoRA": "alora_invocation_tokens",
    "Lily": "of the type LILY",
    "LoRA, `velora_config` of batch averages": "velora_config",
    "LoHa, `module_dropout`": "module_dropout",
}
"""Tuners that are refused, each with a part of the message."""
