"""Checks of all that can be known from a recipe, before a process starts or a model is loaded."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_context_parallel.compat import lookup
from hf_context_parallel.recipe.errors import RecipeError, did_you_mean
from hf_context_parallel.recipe.files import check_files
from hf_context_parallel.recipe.model import BYTES, check_weights, load_config, load_tokenizer, suited
from hf_context_parallel.recipe.schema import Recipe

Rule = Callable[[Any], bool]

AT_LEAST_1: tuple[Rule, str] = (lambda value: value >= 1, "1 or more")
NOT_NEGATIVE: tuple[Rule, str] = (lambda value: 0 <= value < math.inf, "a finite number of 0 or more")
POSITIVE: tuple[Rule, str] = (lambda value: 0 < value < math.inf, "a finite number of more than 0")
EVERY: tuple[Rule, str] = (
    lambda value: 0 < value < 1 or (1 <= value < math.inf and value == int(value)),
    "a whole number of steps, or a share of the run between 0 and 1",
)
BELOW_1: tuple[Rule, str] = (lambda value: 0 <= value < 1, "0 or more, and less than 1")
RULES: dict[str, tuple[Rule, str]] = {
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "max_steps": (lambda value: value >= 1 or value == -1, "1 or more, or -1 for all epochs"),
    "num_train_epochs": POSITIVE,
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": NOT_NEGATIVE,
    "label_smoothing_factor": BELOW_1,
    "save_steps": EVERY,
    "eval_steps": EVERY,
    "logging_steps": EVERY,
    "warmup_steps": NOT_NEGATIVE,
    "dataloader_num_workers": NOT_NEGATIVE,
    "max_length": (lambda value: value >= 2, "2 or more: one token predicts none"),
}
"""Values of the section `training` that Transformers takes as they are, each with what it must be."""


def check_recipe(recipe: Recipe, processes: int | None = None, dry_run: bool = False) -> None:
    """Refuse a recipe that cannot run. Nothing is downloaded, and no device is used.

    Args:
        processes: the number of processes to start on this machine; None if they run already.
        dry_run: True to leave out what a dry run replaces: weights, data and the output folder.

    Raises:
        RecipeError: with what is wrong, and how to correct it.
    """
    check_training(recipe, processes or int(os.environ.get("WORLD_SIZE", 1)))
    if processes is not None and not dry_run:
        check_processes(recipe, processes)
    if recipe.lora is not None:
        recipe.lora_config()
    if recipe.distributed is not None:
        recipe.distributed_config()
    if dry_run:
        return
    check_model(recipe)
    check_files(recipe.data, recipe.trl_columns)
    check_output(recipe)


def check_training(recipe: Recipe, processes: int) -> None:
    """Refuse values of the section `training` that no run on so many processes can have. All are listed.

    Raises:
        RecipeError: naming the keys, the values, and what they must be.
    """
    given = recipe.training.model_dump(exclude_unset=True)
    wrong = []
    for name, (rule, words) in RULES.items():
        value = given.get(name)
        if isinstance(value, int | float) and not rule(value):
            wrong.append(f"training.{name}={value:g} must be {words}.")
    wrong += _reports(given.get("report_to"))
    if wrong:
        raise RecipeError("\n".join(wrong))
    arguments = recipe.training_arguments(checked_for=processes)
    if arguments.eval_strategy != "no" and recipe.data.eval_split is None:
        raise RecipeError(
            f"training.eval_strategy={str(arguments.eval_strategy.value)!r} has nothing to evaluate on. Name a split "
            "in data.eval_split, or leave it out."
        )


def _reports(given: str | list[str] | None) -> list[str]:
    """Describe what is wrong with the names in `report_to`."""
    names = [given] if isinstance(given, str) else given or []
    module = "transformers.integrations.integration_utils"
    known, available = (
        lookup(module, name, "training.report_to")
        for name in ("INTEGRATION_TO_CALLBACK", "get_available_reporting_integrations")
    )
    found = []
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in known:
            hint = did_you_mean(name, ["none", *known])
            found.append(f"training.report_to={name!r} is no integration of Transformers.{hint}")
        elif name not in available():
            found.append(f"training.report_to={name!r} is not installed. Install it, or set training.report_to=none.")
    return found


def check_processes(recipe: Recipe, processes: int) -> None:
    """Refuse a number of processes that the recipe, or the devices of this machine, cannot have.

    Raises:
        RecipeError: with both numbers.
    """
    size, exact = recipe.processes, recipe.distributed is not None
    if processes % size or (exact and processes != size):
        raise RecipeError(
            f"--nproc {processes} is {'not' if exact else 'no multiple of'} the {size} processes of "
            f"{recipe.source_of_processes}. Start {size}{'' if exact else ' or a multiple of it'}."
        )
    if recipe.training.use_cpu:
        return
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if devices < processes:
        raise RecipeError(
            f"{processes} processes need a device each, and this machine has {devices}. Lower context_parallel.size, "
            "start the run on several machines by `accelerate launch`, or set training.use_cpu=true."
        )


def check_model(recipe: Recipe) -> None:
    """Refuse a model or a tokenizer that is known not to fit, as far as it is on this machine.

    Raises:
        RecipeError: naming the key of the recipe.
    """
    model = recipe.model
    if model.name is not None and model.name.startswith((".", "/", "~")) and not Path(model.name).is_dir():
        raise RecipeError(f"model.name: there is no folder {model.name!r}. Correct it, or give a hub id.")
    if model.name is not None and not Path(model.name).is_dir():
        return  # on the hub
    config = load_config(model)
    source = model.tokenizer or model.name
    has_images = recipe.data.images is not None
    here = source == BYTES or Path(source).is_dir()
    tokenizer = load_tokenizer(model) if here and not has_images else None
    suited(config, model, None if tokenizer is None else len(tokenizer), has_images, recipe.context_parallel)
    if model.name is not None:
        check_weights(Path(model.name))


def check_output(recipe: Recipe) -> None:
    """Refuse an output folder that cannot be made or written. It is made.

    Raises:
        RecipeError: with the folder, and what the system says.
    """
    folder = Path(recipe.training.output_dir or "trainer_output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(
            f"training.output_dir: {str(folder)!r} cannot be written ({error.strerror}). Name another folder, or "
            "correct its rights."
        ) from error
