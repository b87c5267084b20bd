"""Training runs that are compared: a trainer of TRL, its arguments, its data and its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .tuners import REFUSED, REFUSED_BY_TRL, TUNERS


@dataclass(frozen=True)
class Case:
    """One training run.

    Args:
        trainer: name of the class.
        data: kind of the samples; see `samples.make_samples`.
        model: type of the model.
        options: arguments of the trainer's configuration.
        vision: True for the model with its vision tower.
        attention: attention of the model without CP.
        tuner: name of the adapters that are trained; see `tuners.TUNERS`. None to train all weights.
        bits: bits of the frozen weights, quantised by bitsandbytes. None for float64.
        zero: stage of DeepSpeed's ZeRO, on shards alone.
        quick: True for a case that stands for the others in a short test.
    """

    trainer: str
    data: str
    model: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    vision: bool = False
    attention: str = "sdpa"
    tuner: str | None = None
    bits: int | None = None
    zero: int | None = None
    quick: bool = False

    @property
    def has_images(self) -> bool:
        """True if the samples have images."""
        return self.data.endswith("images")

    @property
    def refused(self) -> str | None:
        """Part of the message that refuses this case, or None."""
        return REFUSED.get(self.tuner or "")

    @property
    def bound(self) -> float:
        """Largest error that rounding explains. Trainer adds up logged losses in float32."""
        if self.bits and self.trainer != "Trainer":
            return 3e-2  # TRL casts adapters of quantised models to bfloat16
        return 1e-6 if self.dtype == torch.float64 else 1e-4

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model. Neither bitsandbytes nor DeepSpeed takes float64."""
        return torch.float64 if self.bits is None and self.zero is None else torch.float32


PLAIN = {"gradient_checkpointing": False}
GENERATING = {"max_completion_length": 9, "num_generations": 4, "temperature": 0.9}

CASES: dict[str, Case] = {
    "SFT": Case("SFTTrainer", "text", options=PLAIN),
    "SFT, checkpointing, evaluation": Case("SFTTrainer", "text", options={"eval_strategy": "steps", "eval_steps": 1}),
    "SFT, packing `bfd`": Case("SFTTrainer", "text", options={"packing": True, "max_length": 90}, quick=True),
    "SFT, packing `wrapped`": Case(
        "SFTTrainer", "text", options={"packing": True, "packing_strategy": "wrapped", "max_length": 50}
    ),
    "SFT, `padding_free`": Case("SFTTrainer", "text", options={"padding_free": True, "max_length": None}),
    "SFT, `assistant_only_loss`, tools": Case("SFTTrainer", "chat", options={"assistant_only_loss": True}),
    "SFT, `completion_only_loss`": Case("SFTTrainer", "completion", options={"completion_only_loss": True}),
    "SFT, `loss_type='dft'`": Case("SFTTrainer", "text", options={"loss_type": "dft"}),
    "SFT, label smoothing": Case("SFTTrainer", "text", options={"label_smoothing_factor": 0.1}),
    "SFT, NEFTune": Case("SFTTrainer", "text", options={"neftune_noise_alpha": 5.0}),
    "SFT, accumulation": Case("SFTTrainer", "text", options={"gradient_accumulation_steps": 2}),
    "SFT, experts with auxiliary loss": Case("SFTTrainer", "text", "qwen3_moe", options={"router_aux_loss_coef": 1.0}),
    "SFT, LoRA": Case("SFTTrainer", "text", tuner="LoRA, `all-linear`", options=PLAIN),
    "SFT, LoRA, checkpointing": Case("SFTTrainer", "text", tuner="LoRA, `all-linear`"),
    "SFT, attention sinks": Case("SFTTrainer", "text", "gpt_oss", attention="eager"),
    "SFT, packing, windows": Case("SFTTrainer", "text", "gemma3_text", options={"packing": True, "max_length": 90}),
    "SFT, linear attention": Case("SFTTrainer", "text", "qwen3_next"),
    "SFT, Qwen3.5 with its vision tower, on text": Case("SFTTrainer", "text", "qwen3_5", vision=True),
    "SFT, images (Gemma 3)": Case("SFTTrainer", "chat, images", "gemma3", vision=True, options=PLAIN),
    "SFT, images (Gemma 3), LoRA, checkpointing": Case(
        "SFTTrainer", "chat, images", "gemma3", vision=True, tuner="LoRA, `all-linear`"
    ),
    "DPO": Case("DPOTrainer", "preference", quick=True),
    "DPO, evaluation": Case("DPOTrainer", "preference", options={"eval_strategy": "steps", "eval_steps": 1}),
    "DPO, LoRA": Case("DPOTrainer", "preference", tuner="LoRA, `all-linear`"),
    "DPO, precomputed reference": Case("DPOTrainer", "preference", options={"precompute_ref_log_probs": True}),
    "DPO, `padding_free`, which TRL 1.16 does not apply": Case(
        "DPOTrainer", "preference", options={"padding_free": True}
    ),
    "DPO, images (Gemma 3)": Case("DPOTrainer", "preference, images", "gemma3", vision=True),
    "KTO": Case("KTOTrainer", "unpaired"),
    "KTO, LoRA": Case("KTOTrainer", "unpaired", tuner="LoRA, `all-linear`"),
    "KTO, precomputed reference": Case("KTOTrainer", "unpaired", options={"precompute_ref_log_probs": True}),
    "ORPO": Case("ORPOTrainer", "preference"),
    "CPO": Case("CPOTrainer", "preference"),
    "Reward, Llama": Case("RewardTrainer", "preference", options={"eval_strategy": "steps", "eval_steps": 1}),
    "Reward, Qwen3": Case("RewardTrainer", "preference", "qwen3"),
    "GRPO": Case("GRPOTrainer", "prompt", options=GENERATING, quick=True),
    "GRPO, reference, two iterations, evaluation": Case(
        "GRPOTrainer",
        "prompt",
        options={
            **GENERATING,
            "beta": 0.1,
            "num_iterations": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "num_generations_eval": 1,
        },
    ),
    "GRPO, LoRA": Case("GRPOTrainer", "prompt", tuner="LoRA, `all-linear`", options={**GENERATING, "beta": 0.1}),
    "RLOO": Case("RLOOTrainer", "prompt", options={**GENERATING, "beta": 0.1}),
    "Distillation": Case("DistillationTrainer", "prompt", options={"max_completion_length": 9, "temperature": 0.9}),
}

OF_TUNERS: dict[str, Case] = {
    name: Case(
        "Trainer" if name in REFUSED_BY_TRL else "SFTTrainer",
        "text",
        "qwen3_moe" if "experts" in name else "llama",
        tuner=name,
        options={} if name.startswith("prompt") else PLAIN,
        quick=name in ("prompt tuning", "aLoRA"),
    )
    for name in TUNERS
} | {
    "QLoRA, 4 bits": Case("Trainer", "text", tuner="LoRA, `all-linear`", bits=4, quick=True),
    "QLoRA, 8 bits": Case("Trainer", "text", tuner="LoRA, `all-linear`", bits=8),
    "SFT, QLoRA, 4 bits": Case("SFTTrainer", "text", tuner="LoRA, `all-linear`", bits=4),
    "DPO, QLoRA, 4 bits": Case("DPOTrainer", "preference", tuner="LoRA, `all-linear`", bits=4),
}
OF_DEEPSPEED: dict[str, Case] = {
    "Trainer, ZeRO-1": Case("Trainer", "text", zero=1),
    "Trainer, ZeRO-2, accumulation": Case("Trainer", "text", zero=2, options={"gradient_accumulation_steps": 2}),
    "Trainer, ZeRO-3": Case("Trainer", "text", zero=3),
    "SFT, ZeRO-3, checkpointing": Case("SFTTrainer", "text", zero=3),
    "SFT, ZeRO-2, LoRA": Case("SFTTrainer", "text", zero=2, tuner="LoRA"),
    "DPO, ZeRO-2": Case("DPOTrainer", "preference", zero=2),
    "Reward, ZeRO-3": Case("RewardTrainer", "preference", zero=3),
}
TABLES = {"Trainers of TRL": CASES, "Adapters of PEFT, with TRL's SFTTrainer": OF_TUNERS, "DeepSpeed": OF_DEEPSPEED}
