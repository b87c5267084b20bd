"""Fixture of the tests of recipes."""

import pytest

from tests.helpers.recipe import MINIMAL


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path
