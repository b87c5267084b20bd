"""Training on two ranks: one step of the dry runs of recipes for large machines, and of recipes of TRL's trainers."""

import json
import math
import os
from pathlib import Path
from unittest import mock

import pytest
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule

from hf_context_parallel.recipe.dry_run import shrink
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.train import make_trainer
from tests.helpers.recipe import RECIPES

TRL = {
    "sft": {"text": "a text"},
    "dpo": {"prompt": "a question", "chosen": " good", "rejected": " not so"},
    "orpo": {"prompt": "a question", "chosen": " good", "rejected": " not so"},
    "cpo": {"prompt": "a question", "chosen": " good", "rejected": " not so"},
    "reward": {"chosen": "a good answer", "rejected": "another"},
    "kto": {"prompt": "a question", "chosen": " good", "rejected": " not so"},
    "grpo": {"prompt": "a question"},
    "rloo": {"prompt": "a question"},
}
"""A document of the data of each trainer of TRL."""
TINY = """
model:
  type: qwen3
  tokenizer: bytes
  config: {vocab_size: 384, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 1, head_dim: 16}
data: {path: json, data_files: FOLDER/data.jsonl, max_length: 32}
training: {output_dir: FOLDER, use_cpu: true, max_steps: 1, logging_steps: 1, save_strategy: "no", report_to: none}
context_parallel: {size: 2}
"""
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


def trained_with_trl(path: Path, overrides: list[str]) -> dict:
    """Train one step of a recipe of a trainer of TRL, and return what was logged."""
    trainer = make_trainer(load_recipe(path, overrides), [])
    trainer.train()
    AcceleratorState._reset_state()
    return trainer.state.log_history[0]


@pytest.mark.parametrize(
    "trainer", [name if name == "grpo" else pytest.param(name, marks=pytest.mark.exhaustive) for name in TRL]
)
def test_a_recipe_of_trl_trains_a_step(on_ranks, trainer, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TINY.replace("FOLDER", str(tmp_path)))
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(TRL[trainer])}\n" * 8)
    overrides = [f"trainer={trainer}"]
    if trainer in ("grpo", "rloo"):
        overrides += ["rewards=[tests.helpers.recipe:length]", "training.num_generations=2"]
        overrides += ["training.max_completion_length=4", "training.per_device_train_batch_size=2"]
    first, second = on_ranks(2, trained_with_trl, path, overrides)
    assert first["loss"] == second["loss"] and math.isfinite(first["loss"])
    assert first["grad_norm"] == second["grad_norm"] > 0
