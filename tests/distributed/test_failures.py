"""Tests of a rank that raises while others wait for it: they end too, and their error says why."""

from __future__ import annotations

import gc
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

import hf_context_parallel as hcp
from hf_context_parallel.distributed import failure_watch
from hf_context_parallel.distributed.notes import Note, lost
from tests.helpers.models import context, tiny_model, tokens
from tests.helpers.processes import first_of_two
from tests.helpers.trainer import make_trainer

SECONDS = 6
LONG_WAIT = 1.0
"""Seconds after which a rank says for whom it waits, in place of a minute."""


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


def accident(kind: str) -> None:
    """Let this process end or stop, or take its time."""
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "late":
        time.sleep(5 * LONG_WAIT)
    elif kind == "exit":
        sys.exit(0)
    elif kind == "raises":
        raise KeyError("the disk is full")


class Accident(TrainerCallback):
    """Accident of the second rank after its second step, when its note was written."""

    def __init__(self, kind: str):
        self._kind = kind

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and dist.get_rank() == 1:
            time.sleep(LONG_WAIT)
            accident(self._kind)


def training_with_an_accident(rank: int, kind: str, folder, seconds: int) -> str:
    failure_watch.LONG_WAIT, failure_watch.INTERVAL = LONG_WAIT, 0.1
    with patch.object(failure_watch.logger, "warning") as said:
        trainer = make_trainer(2, folder, ddp_timeout=seconds)
        trainer.add_callback(Accident(kind))
        trainer.train()
    return "\n".join(call.args[0] % call.args[1:] for call in said.call_args_list)


def step_with_an_accident(rank: int, kind: str) -> None:
    """Let the second rank have an accident in a block of `cp.shard`."""
    cp, model = context(), tiny_model("llama", "context_parallel")
    for step in range(2):
        with cp.shard({"input_ids": tokens(1, 16), "labels": tokens(1, 16)}, model) as local:
            if rank == step == 1:
                accident(kind)
            model(**local)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("killed", "was killed: its process is gone and raised no error"),
        ("stopped", "is stopped by a signal or a debugger"),
        pytest.param("exit", "raised SystemExit: 0", marks=pytest.mark.exhaustive),
        pytest.param("raises", "raised KeyError: 'the disk is full'", marks=pytest.mark.exhaustive),
    ],
)
def test_a_rank_that_is_lost_in_a_callback_is_named(tmp_path, kind, state):
    """The rank that is stopped is waited for as long as `ddp_timeout` says, and not as long as its process group."""
    message = first_of_two(training_with_an_accident, kind, tmp_path, 4)
    assert message.startswith(f"RuntimeError: this rank waited for another one. rank 1 {state}. Its last note is of ")
    assert "in train(), after training step 2" in message and "log: " in message
    if kind in ("killed", "stopped"):
        assert re.search(r"test_failures\.py:\d+ in (on_step_end|accident) \(process \d+ on ", message)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["killed", pytest.param("stopped", marks=pytest.mark.exhaustive)])
def test_a_rank_that_is_lost_in_a_block_is_named(kind):
    message = first_of_two(step_with_an_accident, kind, timeout=4 if kind == "stopped" else 60)
    assert message.startswith("RuntimeError: this rank waited for another one. rank 1 ")
    assert "process " in message and kind.removesuffix("ed") in message


@pytest.mark.distributed
def test_a_long_wait_is_said_once_and_names_the_rank(tmp_path):
    said = first_of_two(training_with_an_accident, "late", tmp_path, 60)
    assert (
        said.count("after training step 2: rank 1 ") + said.count("logs, evaluation and saving after step 2: rank 1")
        == 1
    )
    assert "rank 0 has waited for " in said and "test_failures.py" in said


def timeouts_of(folder, seconds: int) -> list[float]:
    """Return the timeouts of the world, of a CP group and of shared memory, in a Trainer with `ddp_timeout`."""
    trainer = make_trainer(2, folder, ddp_timeout=seconds)
    groups = (dist.group.WORLD, trainer.cp.groups.group)
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    return [*timeouts, trainer.cp.exchange.carrier._timeout]


def test_ddp_timeout_holds_on_cpus(on_ranks, tmp_path):
    assert on_ranks(2, timeouts_of, tmp_path, 77) == [[77, 77, 77]] * 2


def note_of(rank: int, **changes) -> Note:
    machine = {"machine": f"machine{rank} ", "pid": 1, "started": 0.0, "log": "its own output"}
    return Note(rank, **{**machine, "count": 5, "written": math.inf, **changes})


@pytest.mark.parametrize(
    ("notes", "certain", "found"),
    [
        ([note_of(1), note_of(2)], False, None),
        ([note_of(1), note_of(2, count=4)], False, "rank 2 is behind"),
        ([note_of(1), note_of(2, count=4)], True, None),
        ([note_of(1, waits=True), note_of(2)], False, None),
        ([note_of(1, count=3), note_of(2, written=1.0)], False, "rank 2 has not been heard of for "),
        ([note_of(1, ended=True), note_of(2, raised="KeyError: 'x'")], True, "rank 2 raised KeyError: 'x'"),
        ([note_of(1, ended=True, gave_up=True), note_of(2, ended=True)], True, "rank 2 has ended"),
        ([note_of(1, ended=True, gave_up=True)], True, "rank 1 has ended"),
    ],
)
def test_the_rank_that_is_surely_lost_is_named_first(notes, certain, found):
    named = lost(notes, note_of(0), certain)
    assert named.startswith(found) if found else named == ""
