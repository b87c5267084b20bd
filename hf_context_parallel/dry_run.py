"""What a dry run puts in the place of what a recipe names, so that it needs neither a download nor a large machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase

from hf_context_parallel.build import BYTES, load_tokenizer
from hf_context_parallel.corpus import COLUMNS
from hf_context_parallel.recipe import DataSection, ModelSection, Recipe, RecipeError, model_config_keys

MAX_LENGTH = 256
# Widths and counts by the names that configurations share; each configuration takes those it has.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
HEADS = ("num_attention_heads", "num_key_value_heads")
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def shrink(recipe: Recipe, world_size: int, output_dir: str) -> tuple[Recipe, list[str]]:
    """The recipe to run instead, for one step on `world_size` processes, and a line on each thing replaced.

    Raises:
        RecipeError: if the architecture is neither stated nor to be read from a folder.
    """
    model, data = recipe.model, recipe.data
    on_cpu = not torch.cuda.is_available()
    source = model.tokenizer or model.name
    tokenizer_name = source if source == BYTES or Path(source).is_dir() else BYTES
    small_model = dataclasses.replace(model, name=None, type=architecture(model), tokenizer=tokenizer_name, config={})
    small_model.config = tiny_config(small_model.type, model.config, len(load_tokenizer(small_model)))
    sharded = recipe.distributed is not None and recipe.processes == world_size
    if sharded:  # each rank of tensor parallelism has heads of its own
        least = recipe.distributed.tp_size or 1
        small_model.config |= {key: max(small_model.config[key], least) for key in HEADS if key in small_model.config}
    training = {
        "output_dir": output_dir,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "report_to": "none",
        "resume_from_checkpoint": None,
    }
    if on_cpu:
        training |= {"use_cpu": True, "fsdp": None, "fsdp_config": None}
    small = dataclasses.replace(
        recipe,
        model=small_model,
        data=dataclasses.replace(data, max_length=min(data.max_length, MAX_LENGTH)),
        training=recipe.training.model_copy(update=training),
        context_parallel=dataclasses.replace(
            recipe.context_parallel.of_size(recipe.context_parallel.size if sharded else world_size),
            sequence_parallel=recipe.context_parallel.sequence_parallel and sharded,
            kernel="auto",
        ),
        distributed=recipe.distributed if sharded else None,
    )
    replaced = [
        f"model: a {small_model.type} of {TINY['num_hidden_layers']} layers and width {TINY['hidden_size']} with "
        f"random weights, for {model.name or model.type}",
        f"tokenizer: {tokenizer_name}, for {source}",
        f"data: made-up documents in rows of {small.data.max_length} tokens, for {data.path} in {data.max_length}",
        f"context_parallel.size: {small.context_parallel.size}, "
        f"{'as it is' if sharded else 'the number of processes'}, for {recipe.context_parallel.size}",
        "training: one step, nothing saved" + (", on the CPU without FSDP" if on_cpu else ""),
    ]
    if recipe.distributed is not None and not sharded:
        replaced.append(f"distributed: nothing, for what takes {recipe.processes} processes")
    return small, replaced


def architecture(model: ModelSection) -> str:
    """The model's type, as stated or as a folder's configuration says."""
    if model.type is not None:
        return model.type
    if not Path(model.name).is_dir():
        raise RecipeError(
            f"model.type: a dry run does not ask the hub what {model.name!r} is. State it, such as llama."
        )
    return AutoConfig.from_pretrained(model.name, trust_remote_code=model.trust_remote_code).model_type


def tiny_config(model_type: str, values: dict, vocab_size: int) -> dict:
    """The recipe's own configuration values, with small sizes over them."""
    known = model_config_keys(model_type)
    return values | {key: size for key, size in TINY.items() if key in known} | {"vocab_size": vocab_size}


def made_up_documents(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """A few documents of more than `MAX_LENGTH` tokens, in the recipe's format and column."""
    text = "A dry run reads none of the recipe's data. " * 16
    if section.format == "chat":
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
        document = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    elif section.format == "tokens":
        document = tokenizer(text)["input_ids"]
    else:
        document = text
    return Dataset.from_dict({section.column or COLUMNS[section.format]: [document] * 32})
