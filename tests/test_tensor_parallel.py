"""Tensor parallelism beside context parallelism: a model on T x C (x D) ranks is the model on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import some_labels, tiny_model, tokens
from test_trainer import STOCK, history, make_trainer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_context_parallel as hcp
from hf_context_parallel.mesh import mesh_of

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tensor_parallel_model(folder, attention="context_parallel", dtype=torch.float64, **sizes):
    """The model in the folder, sharded."""
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


def whole(folder, dtype) -> tuple[float, dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    return float(loss), {name: parameter.grad for name, parameter in model.named_parameters()}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(folder, size, dtype, settings, sizes) -> tuple[float, dict[str, torch.Tensor]]:
    model = tensor_parallel_model(folder, dtype=dtype, **sizes)
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size, **settings), mesh_of(model))
    with cp.shard(batch(), model) as local:
        loss = model(**local).loss
        (loss * cp.size).backward()  # FSDP takes the mean over the CP group
    loss = loss.detach()
    dist.all_reduce(loss, group=cp.groups.group)
    return float(loss), {name: full(parameter.grad) for name, parameter in model.named_parameters()}


def saved(folder, model_type: str, dtype=torch.float32, **changes) -> Path:
    """A folder with the model, which Transformers shards as it loads it."""
    tiny_model(model_type, None, dtype, **HEADS, **changes).save_pretrained(folder / model_type)
    return folder / model_type


def assert_exact(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for name, gradient in expected[1].items():
        largest = gradient.abs().max()
        error = (found[1][name] - gradient).abs().max() / largest.clamp(min=1e-6)
        assert error < 1e-5, f"the gradient of {name} differs by {error:.1e} of its largest entry"


TP_CP = {"tp_size": 2, "fsdp_size": 2}


@pytest.mark.parametrize("settings", [{}, {"sequence_parallel": True}], ids=["", "sequence parallel"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2"])
def test_a_plain_loop_gives_the_loss_and_gradients_of_one_process(on_ranks, tmp_path, model_type, settings):
    folder = saved(tmp_path, model_type)
    expected = whole(folder, torch.float32)
    for found in on_ranks(4, sharded, folder, 2, torch.float32, settings, TP_CP):
        assert_exact(found, expected)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granite_swa", "qwen3_moe"])
def test_sinks_and_experts_are_sharded_too(on_ranks, tmp_path, model_type):
    folder = saved(tmp_path, model_type)
    expected = whole(folder, torch.float32)
    for found in on_ranks(4, sharded, folder, 2, torch.float32, {}, TP_CP):
        assert_exact(found, expected)


def trained(kind, folder, model_type, settings, sizes, options) -> list[tuple[float, float]]:
    """The losses and gradient norms of a Trainer's steps, with `kind` ranks a CP group."""
    model = tensor_parallel_model(folder / model_type, dtype=torch.float32, **sizes)
    groups = dist.get_world_size() // sizes["tp_size"] // kind
    # Trainer's batch size is a CP group's; make_trainer counts the ranks of all.
    trainer = make_trainer(kind, folder, model=model, settings=settings, groups=groups, **options)
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


CASES = {
    "padding": ("llama", {}, {}),
    "packing with accumulation": ("qwen3", {}, {"collator": "packed", "gradient_accumulation_steps": 2}),
    "sequence parallel": ("qwen3", {"sequence_parallel": True}, {}),
    "sequence parallel with checkpointing": (
        "llama",
        {"sequence_parallel": True},
        {"collator": "packed", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_trainer_gives_the_losses_and_gradient_norms_of_one_process(on_ranks, tmp_path, case):
    model_type, settings, options = CASES[case]
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path, model_type))
    [expected] = on_ranks(1, history, STOCK, tmp_path, {"model": model, **options})
    for found in on_ranks(4, trained, 2, tmp_path, model_type, settings, TP_CP, options):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
