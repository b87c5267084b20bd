"""Tests of a rank that raises while others wait for it: they end too, and their error says why."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hf_context_parallel as hcp
from tests.helpers.models import context, tiny_model, tokens
from tests.helpers.trainer import make_trainer

SECONDS = 6


def raised_by(step: Callable[[int], None], folder) -> str:
    """Run a step on two ranks, and return the error of this rank.

    The process then lives on until the other rank has raised too, or past the timeout, so that no end of a process
    tells the other rank.
    """
    rank = dist.get_rank()
    dist.destroy_process_group()
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    started = time.monotonic()
    try:
        step(rank)
    except (RuntimeError, KeyError, ValueError) as error:
        raised = f"{type(error).__name__}: {error}"
    (folder / f"raised{rank}").touch()
    while not (folder / f"raised{1 - rank}").exists() and time.monotonic() - started < SECONDS + 2:
        time.sleep(0.02)
    return raised


def alone_in_a_block(folder, when) -> str:
    """Raise on rank 1 in a block, and catch the error."""

    def steps(rank: int) -> None:
        cp, model = context(), tiny_model("llama", "context_parallel")
        batch = {"input_ids": tokens(1, 16), "labels": tokens(1, 16)}
        kernel = type(cp.group.kernel(torch.device("cpu")))
        fails = patch.object(kernel, "forward", side_effect=KeyError("the disk is full"))
        for step in range(2):
            with fails if rank == 1 and when == "in a kernel" else nullcontext(), cp.shard(batch, model) as local:
                if rank == 1 and when == "before":
                    raise KeyError("the disk is full")
                model(**local).loss.backward()
                if rank == 1 and when == "after" and step == 0:
                    raise KeyError("the disk is full")

    return raised_by(steps, folder)


@pytest.mark.parametrize(
    "when", ["in a kernel", *(pytest.param(when, marks=pytest.mark.exhaustive) for when in ("before", "after"))]
)
def test_others_end_within_the_timeout_and_say_why(on_ranks, tmp_path, when):
    mine, raised = on_ranks(2, alone_in_a_block, tmp_path, when)
    assert raised == "KeyError: 'the disk is full'"
    assert mine == "RuntimeError: another rank failed before this one. rank 1: KeyError: 'the disk is full'"


def refused_beside_another_group(folder) -> str:
    """Run two CP groups of one rank under DDP, and give one of them a batch that is refused."""

    def step(rank: int) -> None:
        cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=1))
        model = DistributedDataParallel(tiny_model("llama", "context_parallel"))
        labels = tokens(1, 16)
        if rank == 1:
            labels[0, 3] = -1
        with cp.shard({"input_ids": tokens(1, 16), "labels": labels}, model) as local:
            model(**local).loss.backward()

    return raised_by(step, folder)


def test_other_groups_learn_why_one_was_refused(on_ranks, tmp_path):
    mine, refused = on_ranks(2, refused_beside_another_group, tmp_path)
    assert refused.startswith("ValueError: labels has -1")
    assert mine.startswith("RuntimeError: another rank failed before this one. rank 1: ValueError: labels has -1")


def alike() -> str:
    """Raise an error on all ranks: each rank raises its own, and the next block works."""
    cp, model = context(), tiny_model("llama", "context_parallel")
    batch = {"input_ids": tokens(1, 16), "labels": tokens(1, 16)}
    with pytest.raises(KeyError), cp.shard(batch, model):
        raise KeyError
    with cp.shard(batch, model) as local, torch.no_grad():
        return type(model(**local).loss).__name__


def test_an_error_of_all_ranks_ends_nothing(on_ranks):
    assert on_ranks(2, alike) == ["Tensor", "Tensor"]


def failing_step(folder) -> str:
    """Train with a loss that raises on the last rank."""
    trainer = make_trainer(2, folder)

    class Failing(type(trainer)):
        def compute_loss(self, *args, **kwargs):
            if dist.get_rank() == 3:
                raise KeyError("the disk is full")
            return super().compute_loss(*args, **kwargs)

    trainer.__class__ = Failing
    try:
        trainer.train()
    except (RuntimeError, KeyError) as error:
        raised = f"{type(error).__name__}: {error}"
    del trainer
    gc.collect()
    dist.destroy_process_group()  # so that connections close, as when the process ends
    return raised


def test_a_step_of_the_trainer(on_ranks, tmp_path):
    *others, mine = on_ranks(4, failing_step, tmp_path)
    assert mine == "KeyError: 'the disk is full'"
    for found in others:
        assert found == "RuntimeError: another rank failed before this one. rank 3: KeyError: 'the disk is full'"
