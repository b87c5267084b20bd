"""CP groups that change size at run time, and a Trainer that deals samples to them: the numbers of one process."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import torch.distributed as dist

import hf_context_parallel as hcp
from hf_context_parallel.dynamic.scheduler import Scheduler
from hf_context_parallel.planning.layout import Layout
from tests.helpers.layouts import finely_dealt
from tests.helpers.models import context, needs_sharding_while_loading, some_labels, tiny_model, tokens
from tests.helpers.trainer import STOCK, make_trainer, random_crops, samples_of

LENGTH = 45


def message_of_a_batch_that_outlives_its_size() -> str:
    cp, model = context(), tiny_model("llama", "context_parallel")
    blocks = contextlib.ExitStack()
    with pytest.raises(RuntimeError) as refusal, cp.using(1):
        blocks.enter_context(cp.shard({"input_ids": tokens(1, 16)}, model))
    blocks.close()
    return str(refusal.value)


def test_a_batch_may_not_outlive_its_size(on_ranks):
    for message in on_ranks(2, message_of_a_batch_that_outlives_its_size):
        assert message.startswith("leaving `with cp.using(1)` while a batch is open")


def losses_and_gradients(sizes, settings) -> list[tuple[float, np.ndarray]]:
    """Compute loss and gradients of one batch at each CP size.

    They are summed over all ranks and divided by the number of groups that compute each token.
    """
    model = tiny_model("llama", "context_parallel" if sizes else "sdpa")
    input_ids = tokens(2, LENGTH)
    batch = {"input_ids": input_ids, "labels": some_labels(input_ids)}
    found = []
    if not sizes:
        model(**batch, use_cache=False).loss.backward()
        return [(model(**batch).loss.item(), gradient(model))]
    cp = context(**settings)
    for size in sizes:
        model.zero_grad()
        with cp.using(size), cp.shard(batch, model) as local:
            assert local["input_ids"].shape[1] == -(-LENGTH // (2 * size)) * 2
            assert (cp.size, cp.config.size, cp.rank) == (size, size, dist.get_rank() % size)
            loss = model(**local).loss
            loss.backward()
        assert cp.size == dist.get_world_size()
        total = torch.cat([loss.detach()[None], torch.from_numpy(gradient(model))])
        dist.all_reduce(total)
        total /= dist.get_world_size() // size
        found.append((total[0].item(), total[1:].numpy()))
    assert len(cp._made) == len(set(sizes))
    return found


def gradient(model) -> np.ndarray:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).numpy()


@pytest.mark.parametrize("settings", [{}, {"comm_type": "a2a+p2p", "a2a_size": 2}])
def test_using_another_size_gives_the_numbers_of_one_process(on_ranks, settings):
    [[(loss, expected)]] = on_ranks(1, losses_and_gradients, [], {})
    for found in on_ranks(4, losses_and_gradients, [1, 2, 4, 2, 1], settings):
        for found_loss, found_gradient in found:
            np.testing.assert_allclose(found_loss, loss, rtol=5e-7)
            np.testing.assert_allclose(found_gradient, expected, rtol=1e-7, atol=1e-9)


def nested() -> list[int]:
    cp, seen = context(), []
    with cp.using(2):
        with cp.using(1):
            seen.append(cp.size)
        seen.append(cp.size)
        with pytest.raises(KeyError), cp.using(4):
            seen.append(cp.size)
            raise KeyError
        seen.append(cp.size)
    cp.resize(1)
    seen.append(cp.size)
    return [*seen, cp.groups.data_size]


def test_leaving_restores_the_size(on_ranks):
    assert on_ranks(4, nested) == [[1, 2, 4, 2, 1, 4]] * 4


def refusal(case) -> str:
    cp = context()
    try:
        if case == "ranks differ":
            cp.resize(2 if dist.get_rank() < 3 else 4)
        elif case == "no divisor":
            cp.resize(3)
        elif case == "no number":
            cp.resize("2" if dist.get_rank() == 1 else 2)
        elif case == "open batch":
            with cp.shard({"input_ids": tokens(1, 16)}), cp.using(2):
                pass
        elif case == "sharded before":
            collator = hcp.ContextParallelDataCollator(lambda _: {"input_ids": tokens(1, 16)}, cp.config, cp.rank)
            sharded = collator([])
            with cp.using(2), cp.shard(sharded):
                pass
    except ValueError as caught:
        assert cp.size == 4
        return str(caught)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ranks differ", "rank 0 for size=2 and rank 3 for size=4"),
        ("no divisor", "size=3 does not divide the world size, which is 4"),
        ("no number", "rank 1 of the group: size='2'"),
        ("open batch", "cannot change from 4 to 2 while a batch is open"),
        ("sharded before", "sharded for rank"),
    ],
)
def test_a_size_that_cannot_be_is_refused_on_every_rank(on_ranks, case, message):
    for found in on_ranks(4, refusal, case):
        assert message in found


LONG_TAILED = (9, 61, 12, 30, 17, 120, 10, 24, 11, 80, 14, 40, 19, 13, 28, 55)


def history(kind, folder, options, most=None) -> tuple[list[tuple[float, float]], list[int], list[dict]]:
    """Train, and return loss and gradient norm of each step, the CP sizes of this rank's runs, and the logs."""
    settings = {} if most is None else {"dynamic": True, "max_tokens_per_rank": most}
    trainer = make_trainer(kind, folder, settings=settings, **options)
    trainer.train_dataset = samples_of(LONG_TAILED)
    sizes = []
    if most is not None:
        trainer.model.register_forward_hook(lambda *_: sizes.append(trainer.cp.size))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [(entry["loss"], entry["grad_norm"]) for entry in logs], sizes, logs


CASES = {
    "padding": {},
    "packing": {"collator": "packed"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "means of batches": {"gradient_accumulation_steps": 2, "accepts": False},
    "label smoothing": {"label_smoothing_factor": 0.1, "collator": "packed"},
    "gradient checkpointing": {"gradient_checkpointing": True, "collator": "packed"},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "gradient_accumulation_steps": 2,
    },
}
SIMPLER = {"padding", "packing", "reentrant checkpointing"}
"""Cases that other ones contain, or that make test-all runs alone."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.exhaustive] * (case in SIMPLER)) for case in CASES]
)
def test_dynamic_training_is_that_of_one_process(on_ranks, tmp_path, case):
    options = {"max_steps": 3, "global_batch": 4, **CASES[case]}
    sizes = set()
    for extent, most in ((4, 32), (2, 64)):
        expected, _, _ = on_ranks(4 // extent, history, STOCK, tmp_path, options)[0]
        assert len(expected) == 3
        for found, used, logs in on_ranks(4, history, extent, tmp_path, options, most):
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"extent {extent}")
            sizes |= {(extent, size) for size in used}
            assert all(0 <= entry["idle_share"] < 1 for entry in logs)
    assert len(sizes) > 2, sizes


def finely_dealt_history(extent, folder, options, most) -> tuple[list[tuple[float, float]], list[Layout]]:
    """Train with the smallest chunks, and return loss and gradient norm of each step, and the layouts of all rows."""
    with finely_dealt() as dealt:
        return history(extent, folder, options, most)[0], dealt


def test_rows_of_dynamic_training_are_balanced_within_the_tokens_that_a_rank_holds(on_ranks, tmp_path):
    options = {"max_steps": 3, "global_batch": 4, "collator": "packed"}
    [(expected, _, _)] = on_ranks(1, history, STOCK, tmp_path, options)
    for found, layouts in on_ranks(2, finely_dealt_history, 2, tmp_path, options, 65):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert any(len(layout.chunk_owners) > 2 * layout.size > 2 for layout in layouts)
        assert max(max(layout.local_lengths) for layout in layouts) <= 65


def sharded_history(extent, folder, options, most) -> list[tuple[float, float]]:
    """Train a model from a folder, which Transformers shards over all ranks while loading it."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="context_parallel",
        distributed_config=DistributedConfig(fsdp_size=dist.get_world_size()),
    )
    return history(extent, folder, {**options, "model": model}, most)[0]


@needs_sharding_while_loading
def test_dynamic_training_of_a_sharded_model_is_that_of_one_process(on_ranks, tmp_path):
    options = {"max_steps": 2, "global_batch": 4, "gradient_accumulation_steps": 2, "collator": "packed"}
    tiny_model("llama", None, torch.float32).save_pretrained(tmp_path)
    [(expected, _, _)] = on_ranks(1, history, STOCK, tmp_path, options)
    for found in on_ranks(4, sharded_history, 2, tmp_path, options, 64):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def rerouted() -> list[tuple[int, list[int]]]:
    """Schedule four samples on two CP groups of two ranks: the sizes of groups, and the tokens of their rows."""
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2, dynamic=True, max_tokens_per_rank=8))
    scheduler = Scheduler(cp, tiny_model("llama", "context_parallel"))
    first = 100 * cp.groups.data_rank
    batches = [{"input_ids": torch.arange(n)[None] + first + n, "labels": torch.ones(1, n).long()} for n in (5, 16)]
    return [(round.size, round.batch["input_ids"][0].tolist()) for round in scheduler.rounds(batches)]


def test_samples_travel_to_the_ranks_that_compute_them(on_ranks):
    rounds = on_ranks(4, rerouted)
    loaded = [list(range(first + n, first + n + n)) for first in (0, 100) for n in (5, 16)]
    computed = []
    for number in range(len(rounds[0])):
        rank = 0
        while rank < 4:
            size, row = rounds[rank][number]
            assert all(rounds[other][number] == (size, row) for other in range(rank, rank + size))
            computed.append(row)
            rank += size
    rows = [token for row in computed for token in row if token]  # groups without samples run rows of zeros
    assert sorted(rows) == sorted(token for sample in loaded for token in sample)
    assert all(
        any(sample == row[start : start + len(sample)] for row in computed for start in range(len(row)))
        for sample in loaded
    )


def batch_refusal(case) -> str:
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2, dynamic=True, max_tokens_per_rank=8))
    scheduler = Scheduler(cp, tiny_model("llama", "context_parallel"))
    odd = dist.get_rank() == 3
    batch = {"input_ids": tokens(2, 10), "labels": tokens(2, 10)}
    if case == "too long" and cp.groups.data_rank == 1:
        batch = {name: tokens(1, 17) for name in batch}
    elif case == "no labels" and odd:
        del batch["labels"]
    elif case == "left padding" and odd:
        batch["attention_mask"] = torch.tensor([[1] * 10, [0] * 2 + [1] * 8])
        batch["labels"] = torch.full((2, 10), -100)
    elif case == "embeddings" and odd:
        batch["inputs_embeds"] = torch.zeros(2, 10, 4)
    elif case == "ranks differ" and odd:
        batch["input_ids"] = tokens(2, 10, seed=1)
    try:
        scheduler.rounds([batch])
    except ValueError as caught:
        return str(caught)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("too long", "sample 0 of data rank 1 has 17 tokens, and a group of all 2 ranks holds 16"),
        ("no labels", "rank 3 of the group: the batch has no labels"),
        ("left padding", "row 1 has padding before or between its tokens"),
        ("embeddings", "the batch has 'inputs_embeds'"),
        ("ranks differ", "ranks 2 and 3 are in one CP group and have loaded different samples"),
    ],
)
def test_a_batch_that_cannot_be_dealt_is_refused_on_every_rank(on_ranks, case, message):
    for found in on_ranks(4, batch_refusal, case):
        assert message in found


DYNAMIC = {"dynamic": True, "max_tokens_per_rank": 64}
REFUSED = {
    "output_router_logits": lambda: {"model_type": "qwen3_moe", "model": router_model()},
    "average_tokens_across_devices": lambda: {"average_tokens_across_devices": False},
    "counts positions": lambda: {"model_type": "opt"},
}


def router_model():
    return tiny_model("qwen3_moe", "context_parallel", torch.float32, output_router_logits=True)


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_sum_over_tokens_is_refused(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(1, tmp_path, settings=DYNAMIC, **REFUSED[message]())


@pytest.mark.parametrize(
    "settings",
    [
        {"dynamic": True},
        {"max_tokens_per_rank": 8},
        {"dynamic": True, "max_tokens_per_rank": 1},
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings):
    with pytest.raises(ValueError, match="max_tokens_per_rank"):
        hcp.ContextParallelConfig(**settings)


def steps_with_random_crops(folder) -> int:
    model = tiny_model("gpt2", "context_parallel", torch.float32, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0)
    settings = {"dynamic": True, "max_tokens_per_rank": 64}
    trainer = make_trainer(2, folder, model=model, settings=settings, max_steps=3, global_batch=4)
    trainer.train_dataset = samples_of((9, 61, 12, 30, 17, 40, 10, 24, 11, 50, 14, 40))
    trainer.data_collator = random_crops
    trainer.train()
    return trainer.state.global_step


def test_dropout_leaves_ranks_the_stream_that_they_share(on_ranks, tmp_path):
    assert on_ranks(4, steps_with_random_crops, tmp_path) == [3] * 4
