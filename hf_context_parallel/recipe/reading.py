"""Reading of a recipe by OmegaConf and the dataclasses of the schema, with all mistakes listed at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from hf_context_parallel.config import ContextParallelConfig

from .errors import RecipeError, did_you_mean, shown, without_secrets
from .schema import (
    DataSection,
    DistributedKeywords,
    LoraKeywords,
    ModelSection,
    Recipe,
    arguments_of,
    training_keywords,
)

VALID_KEYS = {
    "model": {field.name for field in dataclasses.fields(ModelSection)},
    "data": {field.name for field in dataclasses.fields(DataSection)},
    "context_parallel": {field.name for field in dataclasses.fields(ContextParallelConfig)},
    "distributed": set(DistributedKeywords.model_fields),
    "lora": set(LoraKeywords.model_fields),
}
"""Valid keys of each section but `training`, whose keys are those of its trainer."""
SECTIONS = (*VALID_KEYS, "training")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, in which `overrides` such as `training.max_steps=3` replace values.

    Raises:
        RecipeError: if the file cannot be read, or keys are unknown, missing or of a wrong type. All are listed.
    """
    what = str(path)
    for override in overrides:
        if not override.partition("=")[0].strip() or "=" not in override:
            raise RecipeError(
                f"{without_secrets(override)!r} is no override. Write section.key=value, such as training.max_steps=3."
            )
    try:
        settings = OmegaConf.load(path)
        for override in overrides:
            what = f"the override {without_secrets(override)!r}"
            settings = OmegaConf.merge(settings, OmegaConf.from_dotlist([override]))
        what = str(path)
        values = OmegaConf.to_container(settings, resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise RecipeError(f"{what} cannot be read as a recipe ({error}). Correct it.") from error
    for name in SECTIONS if isinstance(values, dict) else ():
        if isinstance(values.get(name), list):
            raise RecipeError(
                f"{path} is no valid recipe:\n  {name}: a section has keys, and this is a list, {values[name]}. Write "
                f"{name}: {{key: value}}, or {name}.key=value."
            )
    trainer = values.get("trainer") if isinstance(values, dict) else None
    trainer = trainer if isinstance(trainer, str) else None  # the schema names a value of another type
    recipe_class = Recipe.for_trainer(trainer)
    try:
        # From JSON, pydantic's strict mode accepts a mapping for a dataclass and a string for an enumeration.
        return TypeAdapter(recipe_class).validate_json(json.dumps(values))
    except ValidationError as error:
        keys = VALID_KEYS | {"training": set(training_keywords(arguments_of(trainer)).model_fields)}
        raise RecipeError("\n".join([f"{path} is no valid recipe:", *explain(error, keys)])) from error


def explain(error: ValidationError, keys: Mapping[str, set[str]]) -> list[str]:
    """Format the error as one line for each wrong key.

    Args:
        keys: the valid keys of each section.
    """
    complaints: dict[str, list[str]] = {}
    for details in error.errors():
        # For a union, the location continues with the name of the alternative that did not fit.
        location = tuple(map(str, details["loc"][:2]))
        complaints.setdefault(".".join(location), []).append(complaint(location, details, keys))
    return [
        f"  {key}: {' / '.join(dict.fromkeys(texts))}" if key else f"  {texts[0]}" for key, texts in complaints.items()
    ]


def complaint(location: tuple[str, ...], details: dict[str, Any], keys: Mapping[str, set[str]]) -> str:
    """Describe the error at `location`, which is empty, a section, or a section and a key."""
    kind, value = details["type"], details["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        if len(location) == 1:
            return f"no section has this name.{did_you_mean(location[0], keys, homes_of(location[0], keys))}"
        section, key = location
        return f"unknown key in the section '{section}'.{did_you_mean(key, keys[section], homes_of(key, keys))}"
    if kind in ("missing", "missing_argument"):
        return "it is missing. Add it."
    if kind == "value_error":
        return str(details["ctx"]["error"])
    return f"{details['msg']}, and the value is {shown('.'.join(location), value)}."


def homes_of(key: str, valid: Mapping[str, set[str]]) -> list[str]:
    """List the full names of the keys that are called `key` in any section."""
    return [f"{section}.{key}" for section, keys in valid.items() if key in keys]
