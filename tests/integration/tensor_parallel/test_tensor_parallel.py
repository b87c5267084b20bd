"""Tensor and context parallelism together: a model on T x C (x D) ranks computes the same as on one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import hf_context_parallel as hcp
from hf_context_parallel.distributed.worker_pool import WorkerPool
from tests.helpers.models import needs_sharding_while_loading
from tests.helpers.tensor_parallel import TP_CP, batch, saved, tensor_parallel_model
from tests.helpers.trainer import STOCK, history, make_trainer, samples

pytestmark = needs_sharding_while_loading


def whole(folder, dtype) -> tuple[float, dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(folder, size, dtype, settings, sizes) -> tuple[float, dict[str, torch.Tensor]]:
    model = tensor_parallel_model(folder, dtype=dtype, **sizes)
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size, **settings), hcp.mesh_of(model))
    with cp.shard(batch(), model) as local:
        loss = model(**local).loss
        (loss * cp.size).backward()  # FSDP takes the mean over the CP group
    loss = loss.detach()
    dist.all_reduce(loss, group=cp.groups.group)
    return float(loss), {name: full(parameter.grad) for name, parameter in model.named_parameters()}


def assert_exact(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for name, gradient in expected[1].items():
        largest = gradient.abs().max()
        error = (found[1][name] - gradient).abs().max() / largest.clamp(min=1e-6)
        assert error < 1e-5, f"the gradient of {name} differs by {error:.1e} of its largest entry"


SETTINGS = {
    "ring": {},
    "heads": {"comm_type": "a2a"},
    "sequence parallel": {"sequence_parallel": True},
}


SAMPLE = {("qwen3", "ring"), ("qwen3", "sequence parallel"), ("gemma2", "heads")}
"""Types and settings that stand for the others."""


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.exhaustive)
        for case in product(("llama", "qwen2", "qwen3", "gemma2"), SETTINGS)
    ],
)
def test_a_plain_loop_gives_the_loss_and_gradients_of_one_process(on_ranks, tmp_path, model_type, settings):
    folder = saved(tmp_path, model_type)
    expected = whole(folder, torch.float32)
    for found in on_ranks(4, sharded, folder, 2, torch.float32, SETTINGS[settings], TP_CP):
        assert_exact(found, expected)


@pytest.mark.parametrize(
    "model_type", ["gpt_oss", pytest.param("granite_swa", marks=pytest.mark.exhaustive), "qwen3_moe"]
)
def test_sinks_and_experts_are_sharded_too(on_ranks, tmp_path, model_type):
    folder = saved(tmp_path, model_type)
    expected = whole(folder, torch.float32)
    for found in on_ranks(4, sharded, folder, 2, torch.float32, {}, TP_CP):
        assert_exact(found, expected)


def trained(kind, folder, model_type, settings, sizes, options) -> list[tuple[float, float]]:
    """Train with `kind` ranks in a CP group, and return the loss and gradient norm of every step."""
    model = tensor_parallel_model(folder / model_type, dtype=torch.float32, **sizes)
    groups = dist.get_world_size() // sizes["tp_size"] // kind
    # The batch size of the Trainer is that of a CP group; make_trainer counts all ranks.
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
SIMPLER = {"padding", "packing with accumulation", "sequence parallel"}
"""Cases that the other one, or the tests of plain loops, contain."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.exhaustive] * (case in SIMPLER)) for case in CASES]
)
def test_trainer_gives_the_losses_and_gradient_norms_of_one_process(on_ranks, tmp_path, case):
    model_type, settings, options = CASES[case]
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path, model_type))
    [expected] = on_ranks(1, history, STOCK, tmp_path, {"model": model, **options})
    for found in on_ranks(4, trained, 2, tmp_path, model_type, settings, TP_CP, options):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def evaluation(kind, folder, sizes) -> tuple[float, np.ndarray]:
    """Return the evaluation loss, and predictions of 3 samples."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    if kind != STOCK:
        model = tensor_parallel_model(folder / "llama", dtype=torch.float32, **sizes)
    settings = None if kind == STOCK else {"sequence_parallel": True}
    trainer = make_trainer(kind, folder, model=model, groups=1, settings=settings)
    data = samples(3)
    return trainer.evaluate(data)["eval_loss"], trainer.predict(data).predictions


def test_evaluation_and_prediction_are_those_of_one_process(on_ranks, tmp_path):
    saved(tmp_path, "llama")
    [(loss, logits)] = on_ranks(1, evaluation, STOCK, tmp_path, {})
    for found_loss, found_logits in on_ranks(4, evaluation, 2, tmp_path, TP_CP):
        np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(found_logits, logits, rtol=1e-4, atol=1e-5)


def verified(folder, settings) -> list[tuple[str, str]]:
    model = tensor_parallel_model(folder, dtype=torch.float32, **TP_CP)
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2, **settings), hcp.mesh_of(model))
    return [(found.layer, found.tensor) for found in hcp.verify(model, cp)]


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.exhaustive), {"sequence_parallel": True}],
    ids=["", "sequence parallel"],
)
def test_layers_are_verified(on_ranks, tmp_path, settings):
    for found in on_ranks(4, verified, saved(tmp_path, "llama"), settings):
        for layer in range(2):
            assert (f"model.layers.{layer}", "output") in found
            assert (f"model.layers.{layer}.self_attn", "input gradient") in found


@pytest.fixture(scope="module")
def on_eight_ranks():
    workers = WorkerPool(8, 240)
    yield workers
    workers.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", [{}, {"sequence_parallel": True}], ids=["", "sequence parallel"])
@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (2, {"tp_size": 4, "fsdp_size": 2}),
        (2, {"tp_size": 2, "fsdp_size": 4}),
        (4, {"tp_size": 2, "fsdp_size": 4}),
        (2, {"tp_size": 2, "fsdp_size": 2, "dp_replicate_size": 2}),
        (4, {"tp_size": 2, "fsdp_size": 1, "dp_replicate_size": 4}),
    ],
)
def test_eight_processes_give_the_losses_of_one(on_ranks, on_eight_ranks, tmp_path, size, sizes, settings):
    saved(tmp_path, "qwen3", num_key_value_heads=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3")
    options = {"gradient_accumulation_steps": 2, "collator": "packed"}
    [expected] = on_ranks(1, history, STOCK, tmp_path, {"model": model, **options})
    for found in on_eight_ranks(8, trained, size, tmp_path, "qwen3", settings, sizes, options):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
