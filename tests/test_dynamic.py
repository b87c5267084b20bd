"""Groups that change at run time, and the Trainer that deals samples to them: the same numbers as one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import context, some_labels, tiny_model, tokens
from test_trainer import STOCK, make_trainer

import hf_context_parallel as hcp

LENGTH = 45


def losses_and_gradients(sizes) -> list[tuple[float, np.ndarray]]:
    """Of one batch, for each CP size in turn, added up over the ranks and divided by how often each token counts."""
    cp = context() if sizes else hcp.ContextParallel(hcp.ContextParallelConfig(size=1))
    model = tiny_model("llama", "context_parallel" if sizes else "sdpa")
    input_ids = tokens(2, LENGTH)
    batch = {"input_ids": input_ids, "labels": some_labels(input_ids)}
    found = []
    if not sizes:
        model(**batch, use_cache=False).loss.backward()
        return [(model(**batch).loss.item(), gradient(model))]
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


def test_using_another_size_gives_the_numbers_of_one_process(on_ranks):
    [[(loss, expected)]] = on_ranks(1, losses_and_gradients, [])
    for found in on_ranks(4, losses_and_gradients, [1, 2, 4, 2, 1]):
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


def long_tailed_samples() -> list[dict]:
    """Samples of which one has a single target, so that most ranks have none."""
    made = []
    for number, length in enumerate(LONG_TAILED):
        input_ids = tokens(1, length, seed=number)[0]
        labels = some_labels(input_ids, seed=number)
        if number == 0:
            labels[:] = -100
            labels[3] = input_ids[3]
        made.append({"input_ids": input_ids.tolist(), "labels": labels.tolist()})
    return made


def history(kind, folder, options, most=None) -> tuple[list[tuple[float, float]], list[int], list[dict]]:
    """Loss and gradient norm of each step, the CP sizes that this rank's runs had, and what was logged."""
    settings = {} if most is None else {"dynamic": True, "max_tokens_per_rank": most, "verify": False}
    trainer = make_trainer(kind, folder, settings=settings, **options)
    trainer.train_dataset = long_tailed_samples()
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
    "gradient checkpointing": {"gradient_checkpointing": True, "collator": "packed"},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_dynamic_training_is_that_of_one_process(on_ranks, tmp_path, case):
    options = {"max_steps": 3, "global_batch": 4, **CASES[case]}
    [(expected, _, _)] = on_ranks(1, history, STOCK, tmp_path, options)
    assert len(expected) == 3
    sizes = set()
    for extent, most in ((4, 32), (2, 64)):
        for found, used, logs in on_ranks(4, history, extent, tmp_path, options, most):
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"extent {extent}")
            sizes |= {(extent, size) for size in used}
            assert all(0 <= entry["idle_share"] < 1 for entry in logs)
    assert len(sizes) > 2, sizes
