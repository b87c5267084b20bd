"""A tiny training run by a trainer of TRL, on shards or on whole sequences."""

from __future__ import annotations

import importlib
import inspect
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from ... import trl as ours
from ...config import ContextParallelConfig
from ...integration.border.parallelize import borders_of
from ...integration.model_registry import NAME
from ...trainer.mixin import ContextParallelTrainer
from ..types.tiny import tiny_config, tiny_model
from .cases import Case
from .samples import IMAGE, VOCABULARY, make_processor, make_samples, make_tokenizer
from .tuners import TUNERS

SAMPLES, STEPS, BATCH = 24, 3, 4
TIMED = ("runtime", "_per_second", "_per_second_per_rank", "step_time", "sequence_length", "peak_memory_gib")
"""Ends of the names of logged figures that depend on the clock or the machine, or that only we log."""


class Result(NamedTuple):
    """Numbers of a run.

    Args:
        logs: each log as pairs of a name and a number.
        weights: all trained weights at the end.
        is_sharded: True if the model computed a shard.
    """

    logs: list[dict[str, float]]
    weights: np.ndarray
    is_sharded: bool


def run(case: Case, folder: str, size: int, groups: int = 1) -> Result:
    """Train for a few steps.

    Args:
        folder: an empty folder that all ranks see.
        size: ranks of a CP group; 0 for the trainer of TRL with Transformers' own attention.
        groups: number of groups, or of processes.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    trainer = make_trainer(case, size, groups, folder)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [
        {name: float(x) for name, x in entry.items() if isinstance(x, (int, float)) and not name.endswith(TIMED)}
        for entry in trainer.state.log_history
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    with whole_parameters(model, size and case.zero):
        trained = [p.detach().flatten().double() for p in model.parameters() if p.requires_grad]
    is_sharded = any(border.handled for border in borders_of(model))
    return Result(logs, torch.cat(trained).numpy(), is_sharded)


def whole_parameters(model: torch.nn.Module, stage: int | None) -> AbstractContextManager:
    """Gather the parameters of a model that ZeRO-3 has divided, in a block."""
    if stage != 3:
        return nullcontext()
    zero = importlib.import_module("deepspeed").zero
    return zero.GatheredParameters(list(model.parameters()))


def make_trainer(case: Case, size: int, groups: int, folder: str) -> Trainer:
    """Make the trainer of a case."""
    stock, config, made = classes_of(case.trainer)
    attention = NAME if size else case.attention
    tokenizer = processing_class(case)
    paths = [save_model(case, folder, seed) for seed in range(2)]
    args = config(**arguments_of(case, groups, folder), deepspeed=zero_settings(case.zero if size else None))
    model = load_model(case, paths[0], attention)
    train, evaluation = make_samples(case.data, SAMPLES, folder), make_samples(case.data, 4, folder, seed=1)
    kwargs: dict[str, Any] = {"processing_class": tokenizer, "train_dataset": train, "eval_dataset": evaluation}
    accepted = inspect.signature(stock.__init__).parameters
    if "reward_funcs" in accepted:
        kwargs["reward_funcs"] = [count_vowels, count_bytes]
    if "teacher_model" in accepted:
        kwargs["teacher_model"] = load_model(case, paths[1], attention)
    if case.tuner and "peft_config" in accepted:
        kwargs["peft_config"] = TUNERS[case.tuner]()
    elif case.tuner:
        torch.manual_seed(args.seed)
        model = get_peft_model(model, TUNERS[case.tuner]())
    if stock is Trainer:
        kwargs["train_dataset"] = tokenized(train, tokenizer)
        kwargs["eval_dataset"] = tokenized(evaluation, tokenizer)
        kwargs["data_collator"] = DataCollatorForSeq2Seq(tokenizer)
    if size:
        return made(model, args=args, context_parallel=ContextParallelConfig(size=size), **kwargs)
    return stock(model, args=args, **kwargs)


def classes_of(name: str) -> tuple[type[Trainer], type[TrainingArguments], type[Trainer]]:
    """Find a trainer of Transformers or TRL by its name, the class of its arguments, and our trainer."""
    if name == "Trainer":
        return Trainer, TrainingArguments, ContextParallelTrainer
    made = getattr(ours, name)
    return ours.stock_class(made), ours.arguments_class(made), made


def tokenized(samples: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Turn texts into rows of tokens, whose first quarter is not to be learnt."""

    def row(sample: dict[str, str]) -> dict[str, list[int]]:
        ids = tokenizer(sample["text"])["input_ids"]
        return {"input_ids": ids, "labels": [-100] * (len(ids) // 4) + ids[len(ids) // 4 :]}

    return samples.map(row, remove_columns=samples.column_names)


def save_model(case: Case, folder: str, seed: int = 0) -> Path:
    """Save a tiny model, by the first rank. Trainers load a reference by the name of the model.

    It comes before arguments of ZeRO-3 are made, since Transformers then divides each model that it makes.
    """
    config = model_config(case)
    if case.trainer == "RewardTrainer":
        config.num_labels = 1
    path = Path(folder, f"model{seed}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        tiny_model(config, None, torch.float64, seed, auto_class(case)).save_pretrained(path)
    if dist.is_initialized():
        dist.barrier()
    return path


def model_config(case: Case) -> PreTrainedConfig:
    """Make the configuration of the tiny model of a case, with the ids of its tokens."""
    config = tiny_config(case.model)
    size = VOCABULARY + len(IMAGE) * case.has_images
    for name, value in {"vocab_size": size, "pad_token_id": 0, "eos_token_id": 2}.items():
        setattr(config.get_text_config(), name, value)
    if case.has_images:
        make_processor(config)  # which sets the ids of images
    return config


def processing_class(case: Case) -> Any:
    """Make the tokenizer of a case, or the processor of text and images."""
    return make_processor(tiny_config(case.model)) if case.has_images else make_tokenizer()


def auto_class(case: Case) -> Any:
    """Return the auto class of the model of a case."""
    if case.trainer == "RewardTrainer":
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if case.vision else AutoModelForCausalLM


def load_model(case: Case, path: Path, attention: str) -> PreTrainedModel:
    """Load the model of a case."""
    options: dict[str, Any] = {"attn_implementation": attention, "dtype": case.dtype}
    if case.bits:
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if case.bits == 4 else {"load_in_8bit": True}
        options["quantization_config"] = BitsAndBytesConfig(**bits)
    if case.dtype == torch.float64:
        options["experts_implementation"] = "eager"  # the default, a grouped product, has no float64
    return auto_class(case).from_pretrained(path, **options)


def zero_settings(stage: int | None) -> dict[str, Any] | None:
    """Return the settings of DeepSpeed for a stage of ZeRO, or None."""
    if stage is None:
        return None
    named = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return zero | dict.fromkeys(named, "auto")


def arguments_of(case: Case, groups: int, folder: str) -> dict[str, Any]:
    """Return the arguments of the configuration of a case."""
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH // groups,
        "per_device_eval_batch_size": 2 // groups,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",  # Adam would turn gradients that are rounding errors into full steps
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
        "include_num_input_tokens_seen": True,
        "ddp_find_unused_parameters": case.vision,
        **case.options,
    }
    return arguments


def count_vowels(completions: list[str], **kwargs: Any) -> list[float]:
    """Reward for the bytes that are vowels."""
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def count_bytes(completions: list[str], **kwargs: Any) -> list[float | None]:
    """Reward for length, and none for texts of an odd number of bytes."""
    return [len(text) / 10 if len(text) % 2 == 0 else None for text in completions]
