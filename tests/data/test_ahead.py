"""Tests that batches are planned where they are loaded: a step finds layouts, choices and strategies made."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from hf_context_parallel import parallelize
from hf_context_parallel.attention.planner import Planner
from hf_context_parallel.data import ready
from hf_context_parallel.data.ahead import Board, PlanAhead
from hf_context_parallel.data.batch import SHARD
from hf_context_parallel.data.collator import ContextParallelDataCollator
from hf_context_parallel.data.shard import shard_batch
from tests.helpers.models import context, tiny_model, tokens

ROWS = [(1, 2, 61), (30, 34), (5, 5, 54), (64,), (63, 1), (20, 20, 24), (2, 2, 2, 58), (50, 14)]
"""Documents of each row."""


def collated(samples: list[int]) -> dict[str, torch.Tensor]:
    [number] = samples
    ids = tokens(1, 64, number)
    positions = torch.cat([torch.arange(length) for length in ROWS[number]])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def sharded_by(cp):
    return ContextParallelDataCollator(collated, cp.config, cp.rank)


def made_in_steps(workers: int, context_of_workers: str | None, shards: bool) -> tuple[list[list[int]], list[float]]:
    """Train a step on each row.

    Args:
        shards: True if the collator shards.

    Returns:
        How many layouts, choices and strategies each step made, and its loss.
    """
    model, cp = tiny_model("gemma3_text", "context_parallel").train(), context(layout="balanced")
    parallelize(model, cp)
    planner, made, losses, sharded = cp.group.planner, [], [], []
    planner.take_made()
    collate = sharded_by(cp) if shards else collated
    loader = DataLoader(
        range(len(ROWS)), 1, collate_fn=collate, num_workers=workers, multiprocessing_context=context_of_workers
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready, "shard_batch", lambda *args: sharded.append(args) or shard_batch(*args))
        for batch in cp.prepare_data_loader(loader, device="cpu"):
            planner.take_made()  # what the process of the rank has made while it loaded
            if shards:
                with cp.shard(batch, model) as local:
                    loss = model(**local).loss
            else:
                loss = model(**batch).loss
            made.append([len(entries) for entries in planner.take_made()])
            losses.append(loss.item())
    assert not sharded  # from the first step on
    return made, losses


def stock_losses() -> list[float]:
    model, losses = tiny_model("gemma3_text", "sdpa").train(), []
    for number in range(len(ROWS)):
        losses.append(model(**collated([number]), use_cache=False).loss.item())
    return losses


@pytest.mark.parametrize(
    ("workers", "context_of_workers", "shards"),
    [
        (0, None, False),
        (2, None, False),
        (1, None, True),
        pytest.param(1, "spawn", False, marks=pytest.mark.exhaustive),
    ],
)
def test_a_step_finds_its_plans(on_ranks, workers, context_of_workers, shards):
    expected = stock_losses()
    every = on_ranks(2, made_in_steps, workers, context_of_workers, shards)
    for made, losses in every:
        if shards:  # each rank has its part of the loss
            losses = [sum(parts) for parts in zip(*(losses for _, losses in every))]
        assert losses == pytest.approx(expected, rel=1e-6)
        assert made[0][1:] == [2, 2]  # layers with a window and without
        # Before the first step one row is loaded by accelerate, and two by each worker.
        known = 2 + 2 * workers
        assert made[known:] == [[0, 0, 0]] * (len(ROWS) - known)


def test_what_cannot_be_planned_is_loaded():
    planner = Planner(context().config, 0, {})
    ahead = PlanAhead(lambda samples: samples[0], planner)
    for batch in ({"input_ids": [1, 2]}, {"text": "a"}, [1, 2], {"input_ids": torch.zeros(0, 0)}):
        loaded = ahead([batch])
        assert loaded.batch is batch and loaded.ahead in (None, pickle.dumps((None, None)))


CHANGES = ["nothing", "a value", "another tensor", "one tensor more", "another number", "another rank"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_ready_shard_is_that_of_its_batch_alone(change):
    config, batch = context().config.of_size(2), collated([1]) | {"max_length_q": 34}
    local = shard_batch(ready.describing(batch), config, 1)
    ready.keep_ready(batch, config, 1, local)
    given, rank = ready.describing(batch), 1
    if change == "a value":
        batch["position_ids"][0, 40:] += 1
    elif change == "another tensor":
        given["position_ids"] = batch["position_ids"].clone()
    elif change == "one tensor more":
        given["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    elif change == "another number":
        given["max_length_q"] = 30
    elif change == "another rank":
        rank = 0
    found = ready.shard_of(given, config, rank)
    assert (found[SHARD] is local[SHARD]) == (change == "nothing")
    expected = shard_batch(given, config, rank)
    assert found[SHARD] == expected[SHARD] and found.keys() == expected.keys()
    for name in ("input_ids", "position_ids"):
        assert torch.equal(found[name], expected[name]) and found[name] is not local[name]


def test_a_ready_shard_goes_with_its_batch():
    batch, config = collated([0]), context().config
    before = len(ready._ready)
    ready.keep_ready(batch, config, 0, shard_batch(ready.describing(batch), config, 0))
    assert len(ready._ready) == before + 1
    del batch
    assert len(ready._ready) == before


def test_a_planner_travels_without_its_plans():
    planner = Planner(context().config, 1, {})
    planner.free["cpu"] = 7.0
    copy = pickle.loads(pickle.dumps(planner))
    assert copy.met == ((), {}) and copy.rank == 1
    copy.meet(planner.met)
    assert copy.met == planner.met


def test_a_board_shows_whole_values_once():
    board, memory = Board(), Board()
    memory._memory = board._memory
    assert memory.read() is None
    for value in ({"a": list(range(100))}, {"b": 1}):
        board.write(value)
        assert memory.read() == value and memory.read() is None
    board._memory[10] += 1  # a part of another value
    memory._seen = b""
    assert memory.read() is None
    board.write("x" * Board.SIZE)  # too large
    assert memory.read() is None
