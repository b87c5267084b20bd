"""Tests of runs whose loss is not finite: they stop after a few steps, on all ranks alike."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_context_parallel.trainer.loss_watch import LossWatch
from tests.helpers.trainer import make_trainer


def run_with_broken_losses(folder, broken: list[int], rank: int, settings, **arguments) -> tuple[str, int]:
    """Train with losses that are NaN in some steps on one rank, without gradients of NaN.

    Returns:
        The error, and the number of steps that were begun.
    """
    trainer = make_trainer(2, folder, settings=settings, max_steps=7, **arguments)
    compute = type(trainer).compute_loss
    begun = []

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = compute(trainer, model, inputs, num_items_in_batch=num_items_in_batch)
        step = trainer.state.global_step + 1
        begun.append(step)
        if step in broken and dist.get_rank() // 2 == rank:
            loss = loss + torch.tensor(float("nan"))  # which has no gradient
        return loss

    trainer.compute_loss = compute_loss
    try:
        trainer.train()
    except ValueError as error:
        return str(error), max(begun)
    return "", max(begun)


def saved_by_a_run_that_breaks(folder) -> tuple[str, list[str]]:
    """Train with a checkpoint each step, whose weights become NaN after the second step, and resume with NaN weights.

    Returns:
        The error of the second run, and the checkpoints of the first.
    """

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.data[0, 0] = float("nan")

    trainer = make_trainer(2, folder, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3)
    trainer.add_callback(Breaks())
    with suppress(ValueError):
        trainer.train()
    dist.barrier()
    try:
        trainer.train()
    except ValueError as error:
        return str(error), sorted(path.name for path in Path(folder).glob("checkpoint-*"))
    raise AssertionError("a model with a weight that is NaN trains")


def test_weights_that_are_not_finite_are_not_saved_and_not_trained(on_ranks, tmp_path):
    for message, left in on_ranks(2, saved_by_a_run_that_breaks, str(tmp_path)):
        assert "more parameters hold NaN or infinite weights" in message
        assert left == ["checkpoint-1"]


NAN = "the loss is NaN or infinite since step 2, for 3 steps in a row"
CASES = {
    "three in a row": ([2, 3, 4, 5], {}, {}, 5),
    "the last ones": ([5, 6, 7], {}, {}, 7),
    "accumulated": ([2, 3, 4], {}, {"gradient_accumulation_steps": 2}, 5),
    "dynamic": ([2, 3, 4, 5, 6, 7], {"dynamic": True, "max_tokens_per_rank": 64}, {}, 5),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_stops_after_broken_losses_of_one_group(on_ranks, tmp_path, case):
    broken, settings, arguments, last = CASES[case]
    found = on_ranks(4 if case == "three in a row" else 2, stopped, tmp_path, broken, settings, arguments)
    assert len(set(found)) == 1
    message, steps = found[0]
    assert message.startswith(NAN if broken[0] == 2 else NAN.replace("step 2", "step 5")) and steps == last
    assert "All weights are finite." in message and "learning rate (0.1)" in message


def stopped(folder, broken, settings, arguments) -> tuple[str, int]:
    return run_with_broken_losses(folder, broken, dist.get_world_size() // 2 - 1, settings, **arguments)


@pytest.mark.parametrize(
    ("broken", "settings"), [([2, 3, 5, 6], {}), ([1, 2, 3, 4, 5], {"nan_steps": None})], ids=["apart", "unwatched"]
)
def test_a_run_goes_on(on_ranks, tmp_path, broken, settings):
    assert on_ranks(2, stopped, tmp_path, broken, settings, {}) == [("", 7)] * 2


def test_the_end_of_a_run_warns_of_a_broken_loss(caplog):
    watch, state = LossWatch(3, lambda: None), TrainerState(global_step=1)
    watch.see(torch.tensor(float("inf")))
    watch.on_step_end(None, state, TrainerControl())
    with caplog.at_level(logging.WARNING):
        watch.on_train_end(None, state, TrainerControl())
    assert "NaN or infinite since step 1" in caplog.text
