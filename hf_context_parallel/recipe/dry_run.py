"""What a dry run puts in the place of what a recipe names, so that it needs neither a download nor a large machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_context_parallel.recipe.documents import COLUMNS
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.model import BYTES, load_config, load_tokenizer
from hf_context_parallel.recipe.schema import DataSection, ModelSection, Recipe
from hf_context_parallel.verification.types.tiny import UNSTATED, with_small_sizes

MAX_LENGTH = 128
"""Tokens of a row: fewer than a tiny model has positions, some of which RoBERTa and its like leave out."""
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def shrink(recipe: Recipe, world_size: int, output_dir: str) -> tuple[Recipe, list[str]]:
    """The recipe to run instead, for one step on `world_size` processes, and a line on each thing replaced.

    Raises:
        RecipeError: if the architecture is neither stated nor to be read from a folder, or the configuration is
            refused.
    """
    model, data = recipe.model, recipe.data
    on_cpu = not torch.cuda.is_available()
    source = model.tokenizer or model.name
    tokenizer_name = source if source == BYTES or Path(source).is_dir() else BYTES
    sharded = recipe.distributed is not None and recipe.processes == world_size
    distributed = recipe.distributed if sharded else None
    config = full_configuration(model)
    model_type = model.type or config.model_type
    small_model = dataclasses.replace(model, name=None, type=model_type, tokenizer=tokenizer_name, config={})
    small_config = with_small_sizes(
        config,
        vocabulary=len(load_tokenizer(small_model)),
        tensor_ranks=getattr(distributed, "tp_size", None) or 1,
        expert_ranks=getattr(distributed, "ep_size", None) or 1,  # which older versions of Transformers lack
    )
    small_model.config = {name: value for name, value in small_config.to_dict().items() if name != "model_type"}
    comm_type = recipe.context_parallel.comm_type
    if not isinstance(comm_type, (str, Mapping)):  # one a layer, of which fewer are left
        comm_type = comm_type[: small_config.get_text_config().num_hidden_layers]
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
            comm_type=comm_type,
            sequence_parallel=recipe.context_parallel.sequence_parallel and sharded,
            kernel="auto",
        ),
        distributed=distributed,
    )
    replaced = [
        f"model: a tiny {model_type} with random weights, for {model.name or model.type}",
        f"tokenizer: {tokenizer_name}, for {source}",
        f"data: made-up documents in rows of {small.data.max_length} tokens, for {data.path} in {data.max_length}",
        f"context_parallel.size: {small.context_parallel.size}, "
        f"{'as it is' if sharded else 'the number of processes'}, for {recipe.context_parallel.size}",
        "training: one step, nothing saved" + (", on the CPU without FSDP" if on_cpu else ""),
    ]
    if recipe.distributed is not None and not sharded:
        replaced.append(f"distributed: nothing, for what takes {recipe.processes} processes")
    return small, replaced


def full_configuration(model: ModelSection) -> PreTrainedConfig:
    """The model's own configuration, or for one of the hub, which a dry run does not ask, the default of its type.

    Raises:
        RecipeError: if it is a hub's model and its type is not stated, or the configuration is refused.
    """
    if model.name is None or Path(model.name).is_dir():
        return load_config(model)
    if model.type is None:
        raise RecipeError(
            f"model.type: a dry run does not ask the hub what {model.name!r} is. State it, such as llama."
        )
    values = {**UNSTATED.get(model.type, {}), **model.config}
    return load_config(dataclasses.replace(model, name=None, tokenizer=BYTES, config=values))


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
