"""Data that people have: order by length, workers, mixtures, streams that resume, odd samples; each as without CP."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from tests.helpers.trainer import COLLATORS, STOCK, check_training, make_trainer, padding_collator, samples, trained


def odd_samples() -> list[dict]:
    """Make samples, with some of one token and some without a target."""
    rows = samples(16)
    for number in (2, 5, 11):
        rows[number] = {"input_ids": [7], "labels": [7]}
        rows[number + 1] = {**rows[number + 1], "labels": [-100] * len(rows[number + 1]["input_ids"])}
    return rows


def numbered(first: int, count: int):
    yield from samples(first + count)[first:]


def stream(first: int = 0, count: int = 12) -> datasets.IterableDataset:
    """Make a stream whose length is unknown."""
    return datasets.IterableDataset.from_generator(numbered, gen_kwargs={"first": first, "count": count})


def mixture() -> datasets.IterableDataset:
    return datasets.interleave_datasets([stream(0, 8), stream(8, 6)], probabilities=[0.7, 0.3], seed=5)


def to_multiples(rows: list[dict]) -> dict:
    """Pad a batch to a multiple of 32 tokens."""
    batch = padding_collator(rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    length = -(-batch["input_ids"].shape[1] // 32) * 32
    return {
        name: np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=fill[name]) for name, x in batch.items()
    }


CASES = {
    "by length": ({"train_sampling_strategy": "group_by_length"}, lambda: samples(16), None),
    "persistent workers": (
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "num_train_epochs": 2, "max_steps": -1},
        samples,
        None,
    ),
    "odd samples": ({}, odd_samples, None),
    "mixture": ({}, mixture, None),
    "stream": ({"gradient_accumulation_steps": 2}, stream, None),
    "multiples": ({}, samples, to_multiples),
}


def run(size: int, folder: str, name: str):
    options, data, collator = CASES[name]
    trainer = make_trainer(size or STOCK, folder, **options)
    trainer.train_dataset = data()
    trainer.data_collator = tensors(collator) if collator else COLLATORS["right"]
    return trained(trainer)


def tensors(collator):
    """Turn the arrays of a collator into tensors."""
    import torch

    return lambda rows: {name: torch.as_tensor(x) for name, x in collator(rows).items()}


ODD = ("odd samples", "mixture")
GROUPS = pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.exhaustive), 2])


@GROUPS
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ODD else pytest.mark.exhaustive) for name in CASES]
)
def test_training_is_that_of_as_many_processes(on_ranks, tmp_path, name, groups):
    # Accelerate cannot join batches of unequal length that it reads from a stream for two processes.
    processes = 1 if name in ("mixture", "stream") else groups
    expected = on_ranks(processes, run, 0, tmp_path, name)[0]
    for found in on_ranks(2 * groups, run, 2, tmp_path, name):
        check_training(found, expected, name)


def resumed(size: int, folder: str) -> list[float]:
    """Train on a stream, stop after two steps, and go on from the checkpoint; return the losses of both runs."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    first = make_trainer(size or STOCK, folder, **options)
    first.train_dataset = stream()
    first.train()
    second = make_trainer(size or STOCK, folder, **{**options, "max_steps": 4})
    second.train_dataset = stream()
    second.train(resume_from_checkpoint=True)
    return [entry["loss"] for entry in second.state.log_history if "loss" in entry]


@GROUPS
def test_a_stream_resumes_in_its_middle(on_ranks, tmp_path, groups):
    expected = on_ranks(1, resumed, 0, f"{tmp_path}/whole")[0]
    assert len(expected) == 4
    for found in on_ranks(2 * groups, resumed, 2, f"{tmp_path}/shards"):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
