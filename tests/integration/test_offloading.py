"""Checkpoints and other saved tensors that are moved to the host, by Transformers, PyTorch and TRL.

Without an accelerator none of the three moves anything. Here their hooks copy within the host, by the code that copies
to it where there is an accelerator, but without streams and pinned memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, modeling_utils

import hf_context_parallel as hcp
from hf_context_parallel.verification.types.check import Unrounded
from hf_context_parallel.verification.types.tiny import VOCABULARY
from tests.helpers.border import mean_gradients, model_with
from tests.helpers.models import context, error, labelled

needs_offload = pytest.mark.skipif(
    "offload" not in inspect.signature(getattr(PreTrainedModel, "activation_checkpointing_enable", int)).parameters,
    reason="this version of Transformers does not offload checkpoints",
)


class Copies(torch.autograd.graph.saved_tensors_hooks):
    """Hooks that copy what is saved, as `save_on_cpu` does on an accelerator, and remember the shapes."""

    def __init__(self, shapes: list[tuple]):
        def pack(x: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(x.shape))
            return torch.empty_like(x).copy_(x)

        super().__init__(pack, lambda x: x.clone())


def error_with(
    settings: dict, wrapper: str | None, prepare: Callable[[PreTrainedModel], AbstractContextManager]
) -> float:
    """Compare loss and gradients of two accumulated batches with one process.

    Args:
        prepare: function of the model that returns a block in which its forward runs.
    """
    whole, model = (model_with("causal", "gpt2", name).train() for name in (None, "context_parallel"))
    if wrapper == "FSDP2":
        for layer in model.transformer.h:
            fully_shard(layer)
        fully_shard(model)
    block = prepare(model)
    hcp.parallelize(model, context(**settings))
    worst = 0.0
    for seed in range(2):
        given = labelled(seed=seed)
        with Unrounded():  # the loss alone asks for float32
            expected = whole(**given).loss
            with block:
                found = model(**given).loss
        expected.backward()
        found.backward()
        worst = max(worst, error(found, expected))
    gradients = [x.grad for x in model.parameters()] if wrapper == "FSDP2" else mean_gradients(model)
    gradients = [x.full_tensor() if isinstance(x, DTensor) else x for x in gradients]
    return max(worst, *(error(a, b.grad) for a, b in zip(gradients, whole.parameters())))


def with_checkpoints_of_transformers(wrapper: str | None, reentrant: bool, settings: dict) -> tuple[float, list]:
    shapes = []

    def prepare(model: PreTrainedModel) -> AbstractContextManager:
        model.activation_checkpointing_enable({"use_reentrant": reentrant}, offload=True)
        return nullcontext()

    with mock.patch.object(modeling_utils, "save_on_cpu", lambda **options: Copies(shapes)):
        return error_with(settings, wrapper, prepare), shapes


@needs_offload
@pytest.mark.parametrize(
    ("wrapper", "reentrant", "settings"),
    [
        (None, False, {}),
        (None, True, {}),
        ("FSDP2", False, {"tile_tokens": 4}),
        pytest.param(None, True, {"tile_tokens": 4}, marks=pytest.mark.exhaustive),
        pytest.param("FSDP2", True, {}, marks=pytest.mark.exhaustive),
    ],
)
def test_checkpoints_that_transformers_offloads(on_ranks, wrapper, reentrant, settings):
    """A checkpoint is the input of a layer: 2 rows of 10 tokens, where one process has 19."""
    for worst, shapes in on_ranks(2, with_checkpoints_of_transformers, wrapper, reentrant, settings):
        assert worst < 1e-10
        assert shapes.count((2, 10, 32)) >= 2 * 2


def with_all_on_host(checkpointing: bool) -> tuple[float, list]:
    shapes = []

    def prepare(model: PreTrainedModel) -> AbstractContextManager:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return Copies(shapes)

    return error_with({"tile_tokens": 4}, None, prepare), shapes


@pytest.mark.parametrize(("checkpointing", "moved"), [(False, (2 * 10, 4, 8)), (True, (2, 10, 32))])
def test_a_forward_whose_saved_tensors_are_on_the_host(on_ranks, checkpointing, moved):
    """Queries of attention are moved where layers are not checkpointed, else inputs of layers. Logits are not."""
    for worst, shapes in on_ranks(2, with_all_on_host, checkpointing):
        assert worst < 1e-10 and moved in shapes
        assert not any(shape[-1] == VOCABULARY for shape in shapes if len(shape) > 1)


def with_offloading_of_trl(wrapper: str | None, checkpointing: bool, settings: dict) -> tuple[float, set, int]:
    """Compare a model whose activations TRL offloads.

    Returns:
        The largest error, and the largest numbers of tokens of one call of the head, and of tensors that were moved.
    """
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    seen, moved = [], []

    def prepare(model: PreTrainedModel) -> AbstractContextManager:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        block = get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False, min_offload_size=0)
        forward = model.lm_head.forward

        def seeing(x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape[:-1].numel())
            moved.append(sum(entry[1] for entry in block.tracker.values()))
            return forward(x)

        model.lm_head.forward = seeing
        return block

    as_accelerator = mock.patch.object(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    with as_accelerator, mock.patch.object(torch.cpu, "empty_cache", lambda: None, create=True):
        return error_with(settings, wrapper, prepare), max(seen), max(moved)


@pytest.mark.parametrize(
    ("wrapper", "checkpointing", "settings"),
    [
        (None, False, {}),
        (None, True, {"tile_tokens": 4}),
        (None, False, {"comm_type": "p2p", "head_groups": 2}),
        pytest.param("FSDP2", False, {}, marks=pytest.mark.exhaustive),
        ("FSDP2", True, {}),
    ],
)
def test_activations_that_trl_offloads(on_ranks, wrapper, checkpointing, settings):
    """TRL puts hooks on the head, which makes the logits of some tokens at a time all the same."""
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    settings = {**settings, "loss_chunk_tokens": 3}
    for worst, tokens_of_head, moved in on_ranks(2, with_offloading_of_trl, wrapper, checkpointing, settings):
        assert worst < 1e-10 and moved > 0
        assert tokens_of_head == 3
