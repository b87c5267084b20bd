"""Property of `load_recipe`: whatever a file and its overrides hold, there is a recipe or a RecipeError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.recipe.schema import Recipe
from tests.helpers.examples import examples

RECIPES = sorted(Path("recipes").glob("*.yaml"))
VALUES = st.one_of(
    st.sampled_from(
        [
            None,
            "",
            True,
            0,
            -1,
            1e400,
            float("nan"),
            10**20,
            [],
            {},
            [None],
            {"a": 1},
            "${x}",
            "${model}",
            "???",
            "=",
            "ü",
        ]
    ),
    st.integers(-5, 5),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.text(max_size=3), max_size=3),
)
WORDS = st.one_of(
    st.sampled_from(
        ["model", "data", "training", "context_parallel", "lora", "size", "path", "max_length", "name", ""]
    ),
    st.text(alphabet="abz._[]{}$:=-# 0", max_size=6),
)


@st.composite
def changed(draw: Callable) -> dict[Any, Any]:
    """Draw a recipe of ours in which some values are others, are gone, or have another name."""
    values = yaml.safe_load(draw(st.sampled_from(RECIPES)).read_text(encoding="utf-8"))
    for _ in range(draw(st.integers(1, 3))):
        place = values
        if draw(st.booleans()):
            inner = [value for value in values.values() if isinstance(value, dict) and value]
            place = draw(st.sampled_from(inner)) if inner else values
        key = draw(st.one_of(st.sampled_from(sorted(place, key=str)), WORDS)) if place else draw(WORDS)
        if draw(st.integers(0, 4)):
            place[key] = draw(VALUES)
        else:
            place.pop(key, None)
    return values


@st.composite
def overrides(draw: Callable) -> list[str]:
    names = st.lists(WORDS, min_size=1, max_size=3).map(".".join)
    parts = st.tuples(names, st.sampled_from(["=", "", "=="]), VALUES.map(str))
    return ["".join(part) for part in draw(st.lists(parts, max_size=2))]


def outcome(path: Path, given_overrides: list[str]) -> None:
    try:
        assert isinstance(load_recipe(path, given_overrides), Recipe)
    except RecipeError as refusal:
        text = str(refusal)
        assert len(text) > 20
        assert "Traceback" not in text


SLOW = settings(examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@SLOW
@given(changed(), overrides())
def test_changed_recipes_are_read_or_refused(tmp_path, values, given_overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    outcome(path, given_overrides)


@SLOW
@given(st.one_of(st.binary(max_size=40), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_file_is_read_or_refused(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    outcome(path, [])
