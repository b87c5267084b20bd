"""A plain loop of Accelerate on shards: losses, clipped norms, weights and metrics are those of one process."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import hf_context_parallel as hcp
from tests.helpers.models import tiny_model, tokens
from tests.helpers.trainer import padding_collator

TARGETS = 7
"""Targets of each sample. With equal counts the mean over groups is the mean over all targets."""


def samples() -> list[dict]:
    """Make documents of many lengths with equally many targets."""
    made = []
    for number in range(9):
        ids = tokens(1, 10 + 5 * (number % 4), seed=number)[0].tolist()
        made.append({"input_ids": ids, "labels": [-100] * (len(ids) - TARGETS) + ids[-TARGETS:]})
    return made


def trained(size: int, rows: int) -> tuple[list[tuple[float, float]], np.ndarray, list[int]]:
    """Train in a loop with accumulation and clipping, and gather a metric of each sample.

    Args:
        size: ranks of a CP group; 0 for stock attention on one process.
        rows: samples of a batch of one group.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_model("llama", "context_parallel" if size else None, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(samples(), batch_size=rows, collate_fn=padding_collator)
    if size:
        cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size))
        loader = cp.prepare_data_loader(loader, accelerator)
        model, optimizer = accelerator.prepare(model, optimizer)
        hcp.parallelize(model, cp)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    steps, last = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                steps.append((accelerator.reduce(loss.detach(), "mean").item(), float(norm)))
            optimizer.step()
            optimizer.zero_grad()
        final = batch["input_ids"].gather(1, batch["attention_mask"].sum(1, keepdim=True) - 1)
        last += accelerator.gather_for_metrics(final).flatten().tolist()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return steps, weights.numpy(), last


def test_the_stock_loop_is_that_of_one_process(on_ranks):
    for ranks, size, groups in ((2, 2, 1), (3, 3, 1), (4, 2, 2)):
        [(expected, weights, metric)] = on_ranks(1, trained, 0, 2)
        for found, mine, gathered in on_ranks(ranks, trained, size, 2 // groups):
            np.testing.assert_allclose(found[:-1], expected[:-1], rtol=1e-5)
            assert gathered == metric  # each sample once
            if groups == 1:  # the last batch has one sample, which two groups both read
                np.testing.assert_allclose(found, expected, rtol=1e-5)
                np.testing.assert_allclose(mine, weights, rtol=0, atol=1e-5 * abs(weights).max())
