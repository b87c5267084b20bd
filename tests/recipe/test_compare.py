"""Tests of the comparison of a recipe with one process."""

import pytest

from hf_context_parallel.recipe.compare import compare_with_one_process, difference
from hf_context_parallel.recipe.errors import RecipeError
from tests.helpers.recipe import RECIPES


def test_nothing_to_compare_is_refused():
    with pytest.raises(RecipeError, match=r"size=1 leaves nothing to compare"):
        compare_with_one_process(RECIPES / "demo_cpu.yaml", ["context_parallel.size=1"])


def test_a_loss_that_is_no_number_differs():
    assert difference(2.0, 2.0) == 0
    assert difference(2.0002, 2.0) == pytest.approx(1e-4)
    assert difference(float("nan"), 2.0) == difference(2.0, float("nan")) == float("inf")
