"""Towers that ranks share against the same models on one process: outputs, gradients, and what each rank encodes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import hf_context_parallel as hcp
from hf_context_parallel.compat import tree_leaves
from hf_context_parallel.integration.border.parallelize import borders_of
from hf_context_parallel.integration.outer_call import OuterCall, in_call
from hf_context_parallel.integration.switches import allow_unchecked_models
from hf_context_parallel.integration.towers.features import INSIDE
from hf_context_parallel.verification.types.check import unrounded
from tests.helpers.border import mean_gradients
from tests.helpers.models import context
from tests.helpers.towers import GRIDS, batch_of, drawn, media, multimodal


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute the largest difference, relative to the largest entry or to 1e-4: biases of keys have no gradient."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-4)).item()


def prepared(model: torch.nn.Module, cp: hcp.ContextParallel | None = None) -> hcp.ContextParallel:
    """Prepare a model for all ranks."""
    cp = context() if cp is None else cp
    with allow_unchecked_models():
        hcp.parallelize(model, cp)
    return cp


def pair(model_type: str) -> tuple[Any, Any]:
    """Make a model for one process, and the same model, prepared for the ranks."""
    whole, sharded = (multimodal(model_type, name).train() for name in (None, "context_parallel"))
    prepared(sharded)
    return whole, sharded


def full(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradient_errors(sharded: torch.nn.Module, whole: torch.nn.Module, averaged: bool = False) -> float:
    """Compare gradients, which are None for the same parameters.

    Args:
        averaged: True if a wrapper has taken the mean over the ranks.
    """
    gradients = [full(x.grad) for x in sharded.parameters()] if averaged else mean_gradients(sharded)
    worst = 0.0
    for mine, theirs in zip(gradients, (x.grad for x in whole.parameters()), strict=True):
        assert (mine is None) == (theirs is None)
        worst = worst if theirs is None else max(worst, difference(mine, theirs))
    return worst


def encoded(model: torch.nn.Module, name: str) -> list[int]:
    """Return a list to which each run of a tower adds the number of its patches or items.

    Args:
        name: the name of the tower in its model.
    """
    counts: list[int] = []
    tower = getattr(model.model, name)
    tower.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    return counts


# Whole models


def errors_of_models(model_type: str, items: int, prepare: Callable = lambda model: None) -> float:
    """Compare losses, logits and gradients."""
    whole, sharded = pair(model_type)
    prepare(whole), prepare(sharded)
    batch = batch_of(model_type, items)
    with nullcontext() if prepare is checkpoint else unrounded(whole.config):  # recomputation rounds to float32
        return errors_with(whole, sharded, batch)


def errors_with(whole: torch.nn.Module, sharded: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Compare losses, logits and gradients of two models, after a trial."""
    sharded(**batch)
    expected, found = whole(**batch), sharded(**batch)
    expected.loss.backward()
    found.loss.backward()
    worst = max(difference(found.loss, expected.loss), gradient_errors(sharded, whole))
    whole.eval(), sharded.eval()
    with torch.no_grad():
        return max(worst, difference(sharded(**batch).logits, whole(**batch).logits))


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "llava", "glmasr"])
def test_models_return_what_one_process_returns(on_ranks, model_type):
    """Compare with five images or sounds on two ranks, and with fewer of them than ranks."""
    for ranks, items in ((2, 5), (3, 2)):
        assert max(on_ranks(ranks, errors_of_models, model_type, items)) < 1e-7


def freeze_tower(model: torch.nn.Module) -> None:
    model.model.visual.requires_grad_(False)


def checkpoint(model: torch.nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("prepare, bound", [(freeze_tower, 1e-7), (checkpoint, 1e-6)])
def test_frozen_and_checkpointed_towers(on_ranks, prepare, bound):
    assert max(on_ranks(2, errors_of_models, "qwen2_5_vl", 4, prepare)) < bound


def fsdp_errors() -> float:
    """Train a model under FSDP2 with fewer images than ranks, and compare gradients."""
    whole, sharded = (multimodal("qwen2_5_vl", name).train() for name in (None, "context_parallel"))
    for block in (*sharded.model.visual.blocks, *sharded.model.language_model.layers):
        fully_shard(block)
    fully_shard(sharded.model.visual)
    fully_shard(sharded)
    prepared(sharded)
    batch = batch_of("qwen2_5_vl", 2)
    with unrounded(whole.config):
        whole(**batch).loss.backward()
        sharded(**batch).loss.backward()  # a trial
        worst = gradient_errors(sharded, whole, averaged=True)
        sharded.zero_grad()
        sharded(**batch).loss.backward()
    return max(worst, gradient_errors(sharded, whole, averaged=True))


def fsdp_errors_of_groups() -> tuple[float, int]:
    """Train two CP groups under FSDP2, of which one has a single image, and compare gradients with their mean.

    Returns:
        The largest difference, and the number of runs of the tower.
    """
    whole, sharded = (multimodal("qwen2_5_vl", name).train() for name in (None, "context_parallel"))
    fully_shard(sharded.model.visual)
    fully_shard(sharded)
    prepared(sharded, hcp.ContextParallel(hcp.ContextParallelConfig(size=2)))
    runs = encoded(sharded, "visual")
    batches = [batch_of("qwen2_5_vl", items) for items in (1, 3)]
    with unrounded(whole.config):
        for batch in batches:
            (whole(**batch).loss / 2).backward()
        sharded(**batches[dist.get_rank() // 2]).loss.backward()
    return gradient_errors(sharded, whole, averaged=True), len(runs)


def test_fsdp_of_several_groups(on_ranks):
    for worst, runs in on_ranks(4, fsdp_errors_of_groups):
        assert worst < 1e-7 and runs == 1


def test_fsdp(on_ranks):
    assert max(on_ranks(3, fsdp_errors)) < 1e-7


# Features alone


def feature_errors(model_type: str, name: str, given: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Compare the features of a tower, and the gradients of a function of them.

    Returns:
        The largest difference, and the number of runs of the tower.
    """
    whole, sharded = pair(model_type)
    runs: list[int] = []
    tower = next(x for x in sharded.model.children() if x is not sharded.model.get_decoder())
    tower.register_forward_pre_hook(lambda module, args: runs.append(1))
    expected = getattr(whole.model, name)(**given, return_dict=True)
    with in_call(OuterCall(sharded, sharded.get_decoder(), given, is_alone=False)):
        getattr(sharded.model, name)(**given, return_dict=True)  # a trial
        runs.clear()
        found = getattr(sharded.model, name)(**given, return_dict=True)
    worst = 0.0
    losses = []
    for output in (found, expected):
        kept = [x for field, value in output.items() if field not in INSIDE for x in tree_leaves(value)]
        losses.append((kept, sum((number + 1) * x.pow(2).sum() for number, x in enumerate(kept))))
    (mine, one), (theirs, other) = losses
    worst = max(difference(a, b) for a, b in zip(mine, theirs, strict=True))
    one.backward(), other.backward()
    return max(worst, gradient_errors(sharded, whole)), len(runs)


@pytest.mark.parametrize("name", ["get_image_features", "get_video_features"])
def test_features_of_several_layers(on_ranks, name):
    given, _ = media("qwen3_vl", 8)
    if "video" in name:
        given = {"pixel_values_videos": given["pixel_values"], "video_grid_thw": given["image_grid_thw"]}
    for worst, runs in on_ranks(3, feature_errors, "qwen3_vl", name, given):
        assert worst < 1e-7 and runs == 1


@pytest.mark.parametrize("rows", [1, 2])
def test_images_of_rows(on_ranks, rows):
    """Compare pixels `[B, n, C, H, W]`, of which one row is divided by its images and several by rows."""
    given = {"pixel_values": drawn(rows, 4, 3, 16, 16)}
    for worst, runs in on_ranks(2, feature_errors, "idefics3", "get_image_features", given):
        assert worst < 1e-7 and runs == 1


def test_images_that_pad_rows_run_whole(on_ranks):
    given = {"pixel_values": drawn(2, 3, 3, 16, 16)}
    given["pixel_values"][1, 2] = 0
    for worst, runs in on_ranks(2, feature_errors, "idefics3", "get_image_features", given):
        assert worst < 1e-7 and runs == 1


# What a rank encodes


def patches_of_rank() -> list[list[int]]:
    """Count the patches that this rank encodes, in a sharded call and in calls that are not sharded."""
    _, model = pair("qwen2_5_vl")
    counts, batch = encoded(model, "visual"), batch_of("qwen2_5_vl", 8)
    found = []
    cp = borders_of(model)[0].cp
    with torch.no_grad():
        model(**batch)
        assert len(counts) == 3 and sum(counts[:2]) < counts[2] * 2  # a trial with the cheapest images comes first
        counts.clear()
        model(**batch)
        found.append(counts.copy())
        with cp.whole(model):
            model(**batch)
        model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
        model.eval().generate(**{k: v for k, v in batch.items() if k != "labels"}, max_new_tokens=2, do_sample=False)
    found.append(counts[1:])
    return found


def test_each_rank_encodes_its_share(on_ranks):
    total = sum(rows * columns for _, rows, columns in GRIDS)
    shared, whole = zip(*on_ranks(2, patches_of_rank))
    assert sum(sum(counts) for counts in shared) == total
    assert all(len(counts) == 1 and counts[0] <= 0.6 * total for counts in shared)
    assert all(counts == [total] * 3 for counts in whole)


def runs_of_tower(change: Callable) -> list[int]:
    """Count the images that this rank encodes, run by run, in two calls."""
    _, model = pair("llava")
    change(model)
    counts, batch = encoded(model, "vision_tower"), batch_of("llava", 4)
    torch.manual_seed(0)  # what is drawn must be the same on all ranks
    model(**batch)
    model(**batch)
    return counts


def drop_modules(model: torch.nn.Module) -> None:
    model.model.multi_modal_projector.act = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Dropout(0.1))


def drop_attention(model: torch.nn.Module) -> None:
    model.model.vision_tower.encoder.layers[0].self_attn.dropout = 0.1


def normalise_batches(model: torch.nn.Module) -> None:
    model.model.multi_modal_projector.act = torch.nn.BatchNorm1d(9, dtype=torch.float64)


def draw_unseen(model: torch.nn.Module) -> None:
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, out: out + 0 * torch.rand(1))


def join_items(model: torch.nn.Module) -> None:
    """Let the features of all images be one tensor."""
    features = model.model.multi_modal_projector.forward
    model.model.multi_modal_projector.forward = lambda x: features(x).flatten(0, 1)[None]


def mix_items(model: torch.nn.Module) -> None:
    """Let the features of an image depend on the others."""
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, out: out + out.mean(0, keepdim=True))


@pytest.mark.parametrize("change", [drop_modules, drop_attention, normalise_batches])
def test_towers_that_vary_run_whole(on_ranks, change):
    assert on_ranks(2, runs_of_tower, change) == [[4, 4]] * 2


@pytest.mark.parametrize("change", [draw_unseen, join_items, mix_items])
def test_what_is_not_exact_runs_whole(on_ranks, change):
    """Assert that a tower that fails its trial with two images runs whole, and is not divided again."""
    assert on_ranks(2, runs_of_tower, change) == [[1, 2, 4, 4]] * 2


# Errors


def messages(where: str) -> list[str]:
    """Raise in the tower of the rank that encodes the last image, or give ranks different images, and go on after."""
    _, model = pair("llava")
    batch = batch_of("llava", 4)
    bad = copy.copy(batch)
    if where == "an image":
        bad["pixel_values"] = batch["pixel_values"].clone()
        bad["pixel_values"][3] = float("nan")

        def refuse(module: torch.nn.Module, args: tuple) -> None:
            if args[0].isnan().any():
                raise OSError("a broken image")

        model.model.vision_tower.register_forward_pre_hook(refuse)
    elif dist.get_rank() == 1:
        bad["pixel_values"] = batch["pixel_values"][:3]
    found = []
    for one in (bad, batch):
        try:
            found.append(f"{model(**one).loss.item():.6f}")
        except ValueError as error:
            found.append(str(error))
    return found


def test_an_error_is_raised_on_all_ranks(on_ranks):
    first, second = on_ranks(2, messages, "an image")
    assert first == second
    assert first[0] == "rank 1 of the group: OSError: a broken image"
    assert float(first[1]) > 0


def test_different_images_are_refused(on_ranks):
    first, second = on_ranks(2, messages, "their number")
    assert first == second
    assert "different batches or models" in first[0]


def test_a_copy_is_patched_like_its_model(on_ranks):
    assert max(on_ranks(2, copied_errors)) < 1e-7


def copied_errors() -> float:
    """Compare a copy of a prepared model, whose towers are its own."""
    whole, sharded = pair("llava")
    twin = copy.deepcopy(sharded)
    batch = batch_of("llava", 3)
    with unrounded(whole.config):
        whole(**batch).loss.backward()
        twin(**batch)  # a trial
        twin(**batch).loss.backward()
    assert all(x.grad is None for x in sharded.parameters())
    return gradient_errors(twin, whole)
