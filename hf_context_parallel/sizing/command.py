"""Command `hf-context-parallel plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..integration.tensor_parallel.checks import check_tensor_parallel_type
from ..memory.facts import ModelFacts, facts_of, has_images
from ..recipe.errors import RecipeError
from ..recipe.model import BYTES, load_config
from ..recipe.reading import load_recipe
from ..recipe.schema import BITSANDBYTES, ModelSection, Recipe
from .gpus import GPUS, find_gpu, gpu_here, rates_of
from .megatron import megatron_table
from .plans import Plan, Question, longest_plans, plans_of
from .table import (
    ROWS,
    assumptions,
    described,
    details,
    heading,
    limits,
    longest_table,
    order,
    refused,
    table,
    wrapped,
)
from .writing import write_recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LORA_MODULES = "all-linear"


@dataclass(frozen=True)
class Asked:
    """Options of the command, or what a recipe says in their place. None leaves a value open.

    Args:
        model: a hub id, a folder or a `config.json`.
        length: tokens of a sequence.
        gpus: number of GPUs.
        gpu: name of the GPU.
        lora: rank of adapters; None trains all weights.
        bits: bits of the frozen weights of linear layers; None for those of `weights`.
        tokens: tokens of an optimizer step, of all GPUs.
        rows: sequences that a CP group computes at a time.
        weights: dtype of weights, gradients and states of the optimizer.
        images: share of the tokens that are of images. All are by default, where the model has a vision tower.
        node: GPUs of a node.
        network: GB a second that a GPU sends to other nodes.
        trust_remote_code: run the code that comes with the model.
    """

    model: str | None = None
    length: int | None = None
    gpus: int | None = None
    gpu: str | None = None
    lora: int | None = None
    bits: int | None = None
    tokens: int | None = None
    rows: int | None = None
    weights: str | None = None
    images: float | None = None
    node: int = 8
    network: float = 50.0
    trust_remote_code: bool = False


def run_plan(
    asked: Asked,
    recipe: Path | None = None,
    write: Path | None = None,
    longest: bool = False,
    megatron: bool = False,
    every: bool = False,
) -> int:
    """Plan a run, and print it. Return the exit status: 1 if nothing fits.

    Args:
        recipe: a recipe in place of a model. Options come before what it says.
        write: file for the recipe of the first plan.
        longest: print how long sequences can be.
        megatron: print the table that is known of Megatron-LM.
        every: list all plans.

    Raises:
        RecipeError: if an option is wrong, or the model or the recipe cannot be read.
    """
    if (asked.model is None) == (recipe is None):
        raise RecipeError("RECIPE and --model are both given or both missing. Give one of them.")
    if megatron and (longest or write is not None):
        raise RecipeError("--megatron-table prints one table, and no plan. Leave --longest and --write out.")
    loaded = None if recipe is None else load_recipe(recipe)
    notes = []
    if loaded is not None:
        asked, notes = _with_recipe(asked, loaded)
        section = loaded.model
    else:
        section = ModelSection(name=asked.model, tokenizer=BYTES, trust_remote_code=asked.trust_remote_code)
    config = load_config(section)
    try:
        question, gpu = _question(asked, config, longest or megatron)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    name = section.name or str(recipe)
    print(heading(name, question, gpu))
    for note in (*notes, *_notes(config, question)):
        print(wrapped(f"Note: {note}."))
    if megatron:
        print(f"\n{megatron_table(question)}\n\n{assumptions(question)}")
        return 0
    first = _longest(question, every) if longest else _best(question, every)
    if first is None:
        return 1
    if first.question.length > (most := getattr(config.get_text_config(), "max_position_embeddings", None) or 2**62):
        print("\n" + wrapped(f"The model has {most:,} positions. Beyond them it needs another RoPE scaling."))
    if write is not None:
        folder = str(Path(name).parent) if name.endswith(".json") else name
        write_recipe(write, first, described(first), recipe, folder, config.model_type, asked.lora)
        print(f"\nRecipe of the first plan: {write}")
    return 0


def _best(question: Question, every: bool) -> Plan | None:
    """Print the plans of a question, and return the first."""
    print(order(question) + "\n")
    answer = plans_of(question)
    found = answer.fitting if every else answer.best()
    if found:
        print(table(found, len(found) if every else ROWS))
        if not every and len(answer.fitting) > len(found):
            print(f"\nThe best of each TP and CP, of {len(answer.fitting):,} plans that fit. --all lists them.")
    if answer.others:
        print(f"\n{refused(answer.others)}")
    if not found:
        print(_NOTHING)
        return None
    print(f"\n{details(found[0])}")
    return found[0]


def _longest(question: Question, every: bool) -> Plan | None:
    """Print the plans that go longest, and return the first at its length."""
    found = longest_plans(question)
    if not found:
        print(_NOTHING)
        return None
    print(longest_table(found, len(found) if every else ROWS))
    first = found[0].at(found[0].longest)
    print("\n" + wrapped(f"The first is {described(first)}. {limits(first)}") + f"\n\n{assumptions(question)}")
    return first


_NOTHING = "\nNothing fits. Take more GPUs, GPUs with more memory, --lora, --weights bfloat16, or shorter sequences."


def _with_recipe(asked: Asked, recipe: Recipe) -> tuple[Asked, list[str]]:
    """Fill the options that are open with what a recipe says, and list what a plan does not count."""
    training, lora = recipe.training, recipe.lora
    rows = training.per_device_train_batch_size or 8
    runs = training.gradient_accumulation_steps or 1
    gpus = _first(asked.gpus, recipe.processes)
    length = _first(asked.length, recipe.data.max_length)
    groups = max(1, gpus // recipe.tensor_ranks // recipe.context_parallel.size)
    notes = []
    if recipe.trainer not in (None, "sft"):
        notes.append(f"trainer {recipe.trainer}: reference models, rewards and generated tokens are not counted")
    quantized = recipe.model.quant_method == BITSANDBYTES
    if recipe.model.quant_method not in (None, BITSANDBYTES):
        notes.append(f"model.quantization: weights count as {recipe.model.dtype}")
    modules = None if lora is None else lora.target_modules
    if lora is not None and modules != LORA_MODULES:
        notes.append(f"lora.target_modules={modules}: counted as {LORA_MODULES}")
    filled = Asked(
        model=recipe.model.name,
        length=length,
        gpus=gpus,
        gpu=asked.gpu,
        lora=_first(asked.lora, None if lora is None else lora.r or 8),
        bits=(4 if recipe.model.quantization.get("load_in_4bit") else 8) if quantized else None,
        tokens=_first(asked.tokens, groups * rows * runs * length),
        rows=_first(asked.rows, rows),
        weights=_first(asked.weights, recipe.model.dtype if recipe.model.dtype in DTYPES else None),
        images=asked.images if recipe.data.images is not None else 0.0,
        node=asked.node,
        network=asked.network,
    )
    return filled, notes


def _question(asked: Asked, config: PreTrainedConfig, any_length: bool) -> tuple[Question, str]:
    """Make the question of some options, and name its GPU.

    Raises:
        ValueError: if an option is missing or wrong.
    """
    if asked.length is None and not any_length:
        raise ValueError("--seq-len is missing. Give the tokens of a sequence, or --longest.")
    if asked.weights is not None and asked.weights not in DTYPES:
        raise ValueError(f"--weights={asked.weights!r} is not one of {', '.join(DTYPES)}. Give one of them.")
    here = gpu_here()
    gpu = find_gpu(asked.gpu) if asked.gpu is not None else here
    if gpu is None:
        raise ValueError(f"--gpu is missing, and PyTorch sees none that is known. Give one of {', '.join(GPUS)}.")
    trained = "bfloat16" if asked.lora else "float32"
    images = _images(asked.images, config)
    question = Question(
        _facts(config, asked.lora, asked.bits, images > 0),
        asked.gpus or 1,
        asked.length or 1024,
        rates_of(gpu, asked.node, asked.network * 1e9),
        asked.rows or 1,
        asked.tokens,
        DTYPES[asked.weights or trained],
        asked.lora is None and _may_shard(config),
        images,
    )
    if not any(question.meshes()):
        raise ValueError(
            f"--tokens-per-batch={asked.tokens} is less than the {question.rows} x {question.length} tokens that one "
            "CP group computes at a time. Give more, or shorter sequences."
        )
    return question, gpu.name


def _images(asked: float | None, config: PreTrainedConfig) -> float:
    """Return the share of the tokens that are of images.

    Raises:
        ValueError: if a share is asked for, and the model has no vision tower.
    """
    if has_images(config):
        return 1.0 if asked is None else asked
    if asked:
        raise ValueError(f"--image-share={asked:g}: {config.model_type!r} has no vision tower. Leave it out.")
    return 0.0


def _facts(config: PreTrainedConfig, lora: int | None, bits: int | None, images: bool) -> ModelFacts:
    """Read the facts of a model.

    Raises:
        ValueError: if its layers are not of a kind that is counted.
    """
    try:
        return facts_of(config, lora, bits, images)
    except (AttributeError, TypeError, KeyError) as error:  # a configuration without heads, or the like
        raise ValueError(f"{config.model_type!r} has no plan: its memory is not known ({error}).") from error


def _may_shard(config: PreTrainedConfig) -> bool:
    """Return whether tensor parallelism is allowed for this type of model."""
    try:
        check_tensor_parallel_type(config.get_text_config().model_type, sequence_parallel=False)
    except ValueError:
        return False
    return True


def _notes(config: PreTrainedConfig, question: Question) -> list[str]:
    """List what a reader may miss."""
    notes = []
    facts = question.facts
    if facts.quantized_parameters:
        notes.append(
            f"{facts.quantized_parameters / 1e9:.2f} B parameters are frozen in {facts.quantized_bits:g} bits, and "
            "each GPU holds them whole"
        )
    if facts.lora_parameters is not None:
        notes.append("adapters of PEFT do not run on layers that tensor parallelism shards, so no mesh has it")
    elif not question.may_shard:
        notes.append(f"tensor parallelism has not been found exact for {config.model_type!r}, so no mesh has it")
    if facts.tower is not None and question.images:
        patches = round(question.images * question.length) * facts.tower.merge
        state = "trained" if facts.tower.trained else "frozen"
        notes.append(
            f"{question.images:.0%} of the tokens count as those of images, which are {patches:,} patches of a "
            f"sequence; --image-share says how many they are. The vision tower is {state}"
        )
    if facts.tower is not None and facts.tower.woken and not facts.tower.trained:
        notes.append(
            "gradients run through the frozen tower, since PEFT lets those of its embeddings be computed under "
            "gradient checkpointing"
        )
    if getattr(config, "audio_config", None) is not None:
        notes.append("of towers for sound, weights alone are counted")
    if facts.linear_layers:
        notes.append(f"{facts.linear_layers} layers mix tokens by a state, and count as their projections")
    return notes


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)
