"""Models with images, trained in the ways of the user: loss and gradients against one process."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GradientCheckpointingLayer

import hf_context_parallel as hcp
from hf_context_parallel.integration.patches.module_patch import patch_of
from hf_context_parallel.integration.switches import allow_unchecked_models
from hf_context_parallel.integration.tiles import TilePatch
from hf_context_parallel.verification.types import check
from hf_context_parallel.verification.types.check import unrounded
from tests.helpers.border import mean_gradients
from tests.helpers.images import MARKS, image_collator, image_model, image_samples
from tests.helpers.models import context
from tests.helpers.tiles import unrounded_tiles

IMAGES = ((0,), (1, 0), ())


def lora(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj", "qkv", "linear_fc1"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def without_tower(model: torch.nn.Module) -> torch.nn.Module:
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
    tower.requires_grad_(False)
    return model


def checkpointed(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    model.gradient_checkpointing_enable(options)
    return model


def checkpointed_with_reentry(model: torch.nn.Module) -> torch.nn.Module:
    model.enable_input_require_grads()
    return checkpointed(model, use_reentrant=True)


def lora_checkpointed(model: torch.nn.Module) -> torch.nn.Module:
    return lora(checkpointed(model, use_reentrant=False))


def fsdp(model: torch.nn.Module) -> torch.nn.Module:
    if not torch.distributed.is_initialized():
        return model
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS: dict[str, tuple[str, Callable, dict[str, Any]]] = {
    "LoRA of decoder and tower": ("qwen3_vl", lora, {}),
    "LoRA with checkpointing": ("gemma3", lora_checkpointed, {}),
    "a frozen tower": ("qwen3_vl", without_tower, {}),
    "reentrant checkpointing": ("qwen3_vl", checkpointed_with_reentry, {}),
    "kept attention": ("gemma3", checkpointed, {"attention_checkpoints": "device"}),
    "FSDP2": ("gemma3", fsdp, {}),
    "FSDP2 with DeepStack": ("qwen3_vl", fsdp, {}),
    "tiles": ("qwen3_vl", lambda model: model, {"tile_tokens": 8}),
}
"""Ways with the model type, the function that prepares a model, and settings of the CP group."""
ROUNDED = ("LoRA with checkpointing", "reentrant checkpointing", "kept attention")
"""Ways with casts to float32, since layers are recomputed outside of `unrounded`."""
SIMPLER = ("LoRA with checkpointing", "FSDP2")
"""Ways that make test-all runs alone."""


def errors_of(way: str) -> tuple[float, float, int, list[str]]:
    """Train a model in a way, and the same model on one process.

    Returns:
        The errors of the loss and of the gradients, the number of parameters with a gradient, and the names of modules
        that run on tiles.
    """
    model_type, prepare, settings = WAYS[way]
    batch = image_collator(image_samples(model_type, IMAGES))
    whole, sharded = (image_model(model_type, name).train() for name in (None, "context_parallel"))
    with allow_unchecked_models():
        sharded = hcp.parallelize(prepare(sharded), context(**settings))
    whole = whole if prepare is fsdp else prepare(whole)
    with unrounded_tiles() if way == "tiles" else nullcontext() if way in ROUNDED else unrounded(whole.config):
        expected, found = whole(**batch, use_cache=False).loss, sharded(**batch).loss
        expected.backward()
        found.backward()
    if prepare is fsdp:
        gradients = [x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad for x in sharded.parameters()]
    else:
        gradients = mean_gradients(sharded)
    pairs = [pair for pair in zip(gradients, (x.grad for x in whole.parameters())) if pair != (None, None)]
    least = 1e-2 if way in ROUNDED else 1e-6  # gradients of biases of keys are 0 but for rounding
    worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=least)) for a, b in pairs)
    tiled = [name for name, module in sharded.named_modules() if patch_of(module, TilePatch) is not None]
    return float((found - expected).abs() / expected), worst, len(pairs), tiled


@pytest.mark.parametrize("way", [pytest.param(x, marks=[pytest.mark.exhaustive] * (x in SIMPLER)) for x in WAYS])
def test_training_with_images_is_that_of_one_process(on_ranks, way):
    bound = 1e-5 if way in ROUNDED else 1e-8
    for loss, gradients, count, tiled in on_ranks(2, errors_of, way):
        assert loss < bound and gradients < bound and count
        assert bool(tiled) == (way == "tiles") and not any("visual" in name for name in tiled)


@pytest.mark.exhaustive
def test_tensor_parallelism_of_the_decoder(on_ranks):
    for found, _, _ in on_ranks(4, check.errors_of, "qwen3_vl", {}, 2, False, None, True):
        assert max(max(errors.loss, errors.gradients) for errors in found.values()) < 1e-8


# Batches that are wrong


def without(batch: dict, *names: str) -> dict:
    return {name: value for name, value in batch.items() if name not in names}


def with_other_images(batch: dict) -> dict:
    return {**batch, "pixel_values": batch["pixel_values"] + 1}


def without_last_image(batch: dict) -> dict:
    pixels, grids = batch["pixel_values"], batch["image_grid_thw"]
    return {**batch, "pixel_values": pixels[: -int(grids[-1].prod())], "image_grid_thw": grids[:-1]}


def without_a_placeholder(batch: dict) -> dict:
    ids = batch["input_ids"].clone()
    ids[tuple((ids == MARKS["qwen3_vl"][1]).nonzero()[-1])] = 5
    return {**batch, "input_ids": ids}


def with_another_grid(batch: dict) -> dict:
    return {**batch, "image_grid_thw": batch["image_grid_thw"] + torch.tensor([0, 0, 2])}


DIFFERENT = "have different batches or models"
WRONG: dict[str, tuple[Callable, tuple[int, ...], str]] = {
    "images on one rank": (lambda batch: without(batch, "pixel_values", "image_grid_thw"), (1,), DIFFERENT),
    "other images on one rank": (with_other_images, (1,), DIFFERENT),
    "a placeholder for nothing": (without_last_image, (0, 1), "each feature has one placeholder"),
    "a placeholder for nothing on one rank": (without_last_image, (1,), "ranks? .* of the group"),
    "a feature without placeholder": (without_a_placeholder, (0, 1), "each feature has one placeholder"),
    "a feature without placeholder on one rank": (without_a_placeholder, (1,), "rank 1 of the group"),
    "a grid that does not fit": (with_another_grid, (0, 1), "grids of 88 patches together, and pixel_values has 64"),
    "a grid that does not fit on one rank": (with_another_grid, (1,), DIFFERENT),
}
"""Wrong batches, the ranks that have them, and what all ranks raise."""


def messages() -> list[str]:
    """Give a model the wrong batches one after another, and then a right one."""
    model, cp = image_model("qwen3_vl", "context_parallel"), context()
    with allow_unchecked_models():
        hcp.parallelize(model, cp)
    batch = image_collator(image_samples("qwen3_vl", ((0,), (0, 1), ())))
    found = []
    for change, ranks, _ in WRONG.values():
        with pytest.raises(ValueError) as caught:
            model(**(change(batch) if cp.rank in ranks else batch))
        found.append(str(caught.value))
    assert model(**batch).loss.isfinite()
    return found


def test_wrong_batches_are_refused_alike_on_all_ranks(on_ranks):
    first, second = on_ranks(2, messages)
    for (name, (_, _, said)), message in zip(WRONG.items(), first, strict=True):
        assert re.search(said, message), (name, message)
    assert first == second
