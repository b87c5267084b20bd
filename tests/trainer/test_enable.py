"""Accelerate's own switch for context parallelism: it switches ours on where the model has our attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import hf_context_parallel as hcp
from hf_context_parallel.trainer.enable import BACKEND
from tests.helpers.models import tiny_model
from tests.helpers.trainer import STOCK, check_training, history_and_weights, padding_collator, samples, steps_of
from tests.trainer.test_accelerate import launched, launcher_environment


def plain_trainer(folder: str, attention: str, settings: ParallelismConfig | None = None) -> Trainer:
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=1,
        max_steps=4,
        logging_steps=1,
        learning_rate=0.1,
        optim="sgd",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        parallelism_config=settings,
    )
    model = tiny_model("llama", attention, torch.float32)
    return Trainer(model=model, args=args, train_dataset=samples(), data_collator=padding_collator)


def trained_by_switch(folder: str) -> tuple[bool, int, list]:
    """Train by Transformers' own Trainer."""
    hcp.enable_accelerate()
    trainer = plain_trainer(folder, "context_parallel")
    trainer.train()
    return isinstance(trainer, hcp.ContextParallelMixin), trainer.cp.size, steps_of(trainer)


def test_any_trainer_takes_accelerates_size(on_ranks, tmp_path):
    [(expected, _)] = on_ranks(1, history_and_weights, STOCK, tmp_path, {})
    environment = launcher_environment(cp_size=2, dp_shard_size=2)
    for mixed, size, found in on_ranks(4, launched, environment, trained_by_switch, tmp_path):
        assert mixed and size == 2
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_other_trainers_stay_as_they_are(tmp_path):
    hcp.enable_accelerate()
    assert type(plain_trainer(tmp_path, "sdpa")) is Trainer
    assert type(plain_trainer(tmp_path, "context_parallel")) is Trainer  # accelerate says no size


def loop(size: int) -> tuple[list[tuple[float, float]], np.ndarray]:
    """Train in a plain loop of accelerate, whose settings alone name context parallelism if `size` is not 0."""
    settings = None
    if size:
        hcp.enable_accelerate()
        settings = ParallelismConfig(cp_size=size, cp_backend=BACKEND)
        assert settings.cp_backend == BACKEND
    accelerator = Accelerator(cpu=True, parallelism_config=settings)
    model = tiny_model("llama", "context_parallel" if size else None, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(samples(), batch_size=2, collate_fn=padding_collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    steps = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), float(norm)))
    return steps, torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).numpy()


def test_a_plain_loop_takes_accelerates_backend(on_ranks):
    [expected] = on_ranks(1, loop, 0)
    for ranks in (2, 3):
        for found in on_ranks(ranks, loop, ranks):
            check_training(found, expected)


def test_other_backends_are_refused_as_before():
    hcp.enable_accelerate()
    with pytest.raises(ValueError, match="cp_backend must be one of"):
        ParallelismConfig(cp_size=2, cp_backend="ours")
