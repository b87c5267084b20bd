"""Helpers of the tests of tensor parallelism: a model in a folder that Transformers loads sharded, and a batch."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.helpers.models import some_labels, tiny_model, tokens

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tensor_parallel_model(folder, attention="context_parallel", dtype=torch.float64, **sizes):
    """Load the model in the folder, sharded."""
    config = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, attn_implementation=attention, dtype=dtype
    )


def batch() -> dict[str, torch.Tensor]:
    input_ids = tokens(2, 45)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    labels = some_labels(input_ids).masked_fill(mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def saved(folder, model_type: str, dtype=torch.float32, **changes) -> Path:
    """Save a model in a folder, from which Transformers loads it sharded."""
    tiny_model(model_type, None, dtype, **{**HEADS, **changes}).save_pretrained(folder / model_type)
    return folder / model_type


TP_CP = {"tp_size": 2, "fsdp_size": 2}
