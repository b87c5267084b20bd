"""A plain loop of Accelerate on shards: losses, clipped norms, weights and metrics are those of one process."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather, gather_object
from torch.optim.lr_scheduler import LambdaLR
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


def decayed(optimizer: torch.optim.Optimizer, processes: int) -> LambdaLR:
    """Make a schedule that decays the learning rate by 0.8 in each step of that many processes."""
    return LambdaLR(optimizer, lambda batches: 0.8 ** (batches / processes))


def trained(size: int, rows: int) -> tuple[list[tuple[float, float, float]], np.ndarray, list[int]]:
    """Train in a loop with accumulation, clipping and a schedule, and gather a metric of each sample.

    Args:
        size: ranks of a CP group; 0 for stock attention on one process.
        rows: samples of a batch of one group.

    Returns:
        Loss, norm and learning rate of each step, the weights at the end, and the metric.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_model("llama", "context_parallel" if size else None, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(samples(), batch_size=rows, collate_fn=padding_collator)
    if size:
        groups = accelerator.num_processes // size
        cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size))
        loader = cp.prepare_data_loader(loader, accelerator)
        assert accelerator.num_processes == groups and accelerator.is_last_process == (
            dist.get_rank() == groups * size - 1
        )
        schedule = decayed(optimizer, groups)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        hcp.parallelize(model, cp)
    else:
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, decayed(optimizer, 1))
    model.train()
    steps, last = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                rate = schedule.get_last_lr()[0]
                steps.append((accelerator.reduce(loss.detach(), "mean").item(), float(norm), rate))
            optimizer.step()
            schedule.step()
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


def rates_of_one_cycle(size: int) -> list[float]:
    """Step a schedule of fixed length to its end and beyond."""
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=5)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    if size:  # the accelerator learns of groups after it has prepared the schedule
        cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size))
        cp.prepare_data_loader(DataLoader(samples()), accelerator)
    rates = []
    for _ in range(6):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


def test_a_schedule_of_fixed_length_ends_as_on_one_process(on_ranks):
    [expected] = on_ranks(1, rates_of_one_cycle, 0)
    assert on_ranks(2, rates_of_one_cycle, 2) == [expected] * 2


def gathered(size: int, streamed: bool) -> tuple[list, list, list[float], list[str]]:
    """Gather by groups in every way that accelerate has, inside a step and outside."""
    accelerator = Accelerator(cpu=True)
    data = [{"number": number} for number in range(7)]
    if streamed:
        data = datasets.IterableDataset.from_generator(lambda: ({"number": number} for number in range(7)))
    loader = DataLoader(
        data, batch_size=2, collate_fn=lambda rows: {"x": torch.tensor([row["number"] for row in rows])}
    )
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size))
    loader = cp.prepare_data_loader(loader, accelerator)
    tensors, words = [], []
    for batch in loader:
        tensors += accelerator.gather_for_metrics(batch["x"]).tolist()
        words += accelerator.gather_for_metrics([f"word {x}" for x in batch["x"].tolist()])
    share = torch.tensor([float(cp.groups.data_rank)])
    sums = [accelerator.gather(share).sum().item(), accelerator.reduce(share, "sum").item()]
    assert accelerator.process_index == dist.get_rank()
    with accelerator.in_step():
        assert accelerator.process_index == cp.groups.data_rank
        sums += gather(share).tolist()
        names = gather_object([f"group {cp.groups.data_rank}"])
    assert len(gather(share)) == dist.get_world_size()  # accelerate itself, outside of steps
    return tensors, words, sums, names


@pytest.mark.parametrize("streamed", [False, True], ids=["sized", "streamed"])
def test_collectives_of_accelerate_count_groups(on_ranks, streamed):
    for tensors, words, sums, names in on_ranks(4, gathered, 2, streamed):
        assert sorted(tensors) == list(range(7))
        assert words == [f"word {x}" for x in tensors]
        assert sums == [1.0, 1.0, 0.0, 1.0]
        assert names == ["group 0", "group 1"]
