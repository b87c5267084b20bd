"""Training of the recipes for large machines: one step of their dry runs on two ranks."""

import math
import os
from unittest import mock

import pytest
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule

from hf_context_parallel.recipe.dry_run import shrink
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.train import make_trainer
from tests.helpers.recipe import RECIPES

LARGE = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith("_cpu"))


def trained(name: str, folder: str) -> tuple[dict, bool, bool]:
    """Train one step of a recipe's dry run. Return what was logged, and if weights are in 4 bits and layers FSDP's."""
    small, _ = shrink(load_recipe(RECIPES / f"{name}.yaml"), 2, folder)
    with mock.patch.dict(os.environ):  # TrainingArguments asks for FSDP by variables, which later recipes would find
        trainer = make_trainer(small, [], dry_run=True)
        trainer.train()
    AcceleratorState._reset_state()
    quantised = any(hasattr(weight, "quant_state") for weight in trainer.model.parameters())
    sharded = sum(isinstance(module, FSDPModule) for module in trainer.model.modules()) > 1
    return trainer.state.log_history[0], quantised, sharded


@pytest.mark.parametrize("name", LARGE)
def test_recipes_for_large_machines_train_a_step_when_shrunk(on_ranks, name, tmp_path):
    logged, quantised, sharded = on_ranks(2, trained, name, str(tmp_path))[0]
    assert logged["sequence_length"] == 128
    assert math.isfinite(logged["loss"]) and 0 < logged["grad_norm"] < math.inf
    assert quantised == ("qlora" in name)
    assert sharded == bool(load_recipe(RECIPES / f"{name}.yaml").training.fsdp)
