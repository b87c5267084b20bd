"""Dry run of a recipe: a tiny model and made-up documents, which need neither a download nor a large machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_context_parallel.recipe.content import COLUMNS
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.images import draw_pages
from hf_context_parallel.recipe.model import BYTES, load_config, load_tokenizer
from hf_context_parallel.recipe.schema import BITSANDBYTES, DataSection, ModelSection, Recipe
from hf_context_parallel.recipe.trl_columns import PAIRS, TrlColumns
from hf_context_parallel.verification.types.tiny import UNSTATED, with_small_sizes

MAX_LENGTH = 128
"""Most tokens of a row. A tiny model has more positions, and RoBERTa and similar types do not use all of them."""
COLUMNS_OF = {
    "kto": ("prompt", "completion", "label"),
    "grpo": ("prompt",),
    "rloo": ("prompt",),
}
"""Columns of the data of trainers of TRL other than `sft`. The rest have `PAIRS`."""
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def shrink(recipe: Recipe, world_size: int, output_dir: str) -> tuple[Recipe, list[str]]:
    """Make a small recipe that runs one step on `world_size` processes.

    Args:
        recipe: the recipe of the full run.
        world_size: the number of processes of the dry run.
        output_dir: the folder for its output.

    Returns:
        The small recipe, and a line on each thing that it replaces.

    Raises:
        RecipeError: if the model type is neither stated nor readable from a folder, or the configuration is invalid.
    """
    model, data = recipe.model, recipe.data
    on_cpu = not torch.cuda.is_available()
    source = model.tokenizer or model.name
    has_images = data.images is not None
    tokenizer_name = source if not has_images and Path(source).is_dir() else BYTES
    sharded = recipe.distributed is not None and recipe.processes == world_size
    distributed = recipe.distributed if sharded else None
    config = full_configuration(model)
    model_type = model.type or config.model_type
    # Random weights have no format of their own to be read.
    quantization = model.quantization if model.quant_method == BITSANDBYTES else None
    small_model = dataclasses.replace(
        model, name=None, type=model_type, tokenizer=tokenizer_name, config={}, quantization=quantization
    )
    small_config = with_small_sizes(
        config,
        vocabulary=len(load_tokenizer(small_model)),
        tensor_ranks=getattr(distributed, "tp_size", None) or 1,
        expert_ranks=getattr(distributed, "ep_size", None) or 1,  # missing in older versions of Transformers
    )
    small_model.config = {name: value for name, value in small_config.to_dict().items() if name != "model_type"}
    comm_type = recipe.context_parallel.comm_type
    if not isinstance(comm_type, (str, Mapping)):  # a list with an entry per layer, of which fewer are left
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
        training["use_cpu"] = True
        if world_size == 1:
            training |= {"fsdp": None, "fsdp_config": None}
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            given = getattr(recipe.training, name, None)
            if isinstance(given, dict):  # offloading needs pinned memory
                training[name] = {key: value for key, value in given.items() if key != "offload"}
    small = dataclasses.replace(
        recipe,
        model=small_model,
        data=dataclasses.replace(
            data,
            max_length=min(data.max_length, MAX_LENGTH),
            images="images" if has_images else None,
            image_options={},
        ),
        training=recipe.training.model_copy(update=training),
        context_parallel=dataclasses.replace(
            recipe.context_parallel.of_size(recipe.context_parallel.size if sharded else world_size),
            comm_type=comm_type,
            sequence_parallel=recipe.context_parallel.sequence_parallel and sharded,
            kernel="auto",
        ),
        distributed=distributed,
    )
    where = f", on the CPU without {'FSDP and ' if world_size == 1 else ''}offloading" if on_cpu else ""
    replaced = [
        f"model: a tiny {model_type} with random weights, for {model.name or model.type}",
        f"tokenizer: {tokenizer_name}, for {source}",
        f"data: made-up documents in rows of {small.data.max_length} tokens, for {data.path} in rows of "
        f"{data.max_length}",
        f"context_parallel.size: {small.context_parallel.size}, "
        f"{'as it is' if sharded else 'the number of processes'}, for {recipe.context_parallel.size}",
        "training: one step, nothing saved" + where,
    ]
    if recipe.distributed is not None and not sharded:
        replaced.append(f"distributed: left out, since it needs {recipe.processes} processes")
    return small, replaced


def full_configuration(model: ModelSection) -> PreTrainedConfig:
    """Load the full configuration of a model. For a model of the hub it is the default of its type, without download.

    Raises:
        RecipeError: if the model is on the hub and its type is not stated, or the configuration is invalid.
    """
    if model.name is None or Path(model.name).is_dir():
        return load_config(model)
    if model.type is None:
        raise RecipeError(
            f"model.type: it is missing, and a dry run does not ask the hub for the type of {model.name!r}. Add it, "
            "such as llama."
        )
    values = {**UNSTATED.get(model.type, {}), **model.config}
    return load_config(dataclasses.replace(model, name=None, tokenizer=BYTES, config=values))


def made_up_documents(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, trl: TrlColumns | None = None
) -> Dataset:
    """Make a few documents of more than `MAX_LENGTH` tokens, in the format and the columns of the recipe."""
    text = "A dry run reads none of the recipe's data. " * 16
    if trl is not None:
        columns = {"sft": (trl.text,), **COLUMNS_OF}.get(trl.trainer, PAIRS)
        return Dataset.from_list([{name: _entry(name, text, number) for name in columns} for number in range(32)])
    if section.format == "chat":
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
        question = text if section.images is None else text[:40]  # a prompt with images is never cut
        document = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    elif section.format == "tokens":
        document = tokenizer(text)["input_ids"]
    else:
        document = text
    columns = {section.column or COLUMNS[section.format]: [document] * 32}
    if section.images is not None:
        columns[section.images] = [[*draw_pages(" "), *draw_pages("two lines\n" * 2)]] * 32
    return Dataset.from_dict(columns)


def _entry(column: str, text: str, number: int) -> str | bool:
    """Make the entry of a column of a trainer of TRL. Prompts are short, and every second label is True."""
    if column == "label":
        return number % 2 == 0
    return text[:40] if column == "prompt" else f"{text} {column}"
