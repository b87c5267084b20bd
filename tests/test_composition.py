"""CP beside what else divides a run: the Trainer's losses and gradient norms are those of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import tiny_model
from test_trainer import STOCK, history
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

MODEL = {"model_type": "qwen3"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model in a folder: Transformers shards what it loads."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("qwen3", None, torch.float32).save_pretrained(folder)
    return folder


def sharded_history(size, folder, checkpoint, sizes, options) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a model that Transformers sharded while loading it."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="context_parallel", distributed_config=DistributedConfig(**sizes)
    )
    return history(size, folder, {**options, "model": model})


@pytest.mark.parametrize("sizes", [{"fsdp_size": 4}, {"fsdp_size": 2, "dp_replicate_size": 2}], ids=["fsdp", "hsdp"])
@pytest.mark.parametrize("options", [{"collator": "packed", "gradient_accumulation_steps": 2}], ids=["packed"])
def test_a_model_sharded_by_transformers(on_ranks, tmp_path, checkpoint, sizes, options):
    [expected] = on_ranks(1, history, STOCK, tmp_path, {**MODEL, **options})
    for found in on_ranks(4, sharded_history, 2, tmp_path, checkpoint, sizes, options):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
