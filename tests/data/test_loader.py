"""Data loaders that deal samples to CP groups, against Transformers' own Trainer on as many processes."""

from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import hf_context_parallel as hcp
from hf_context_parallel.data.loader import _Dealer
from tests.helpers.streams import Stream
from tests.helpers.trainer import STOCK, make_trainer, samples, samples_of

SAMPLERS = {
    "weighted": lambda data: {"sampler": WeightedRandomSampler([1.0] * len(data), len(data), replacement=False)},
    "subset": lambda data: {"sampler": SubsetRandomSampler(range(len(data)))},
    "batches": lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 2, False)},
    "a rank's own generator": lambda data: {
        "sampler": RandomSampler(data, generator=torch.Generator().manual_seed(dist.get_rank()))
    },
}


def sampled(sampler: str) -> list[list[int]]:
    cp, data = hcp.ContextParallel(hcp.ContextParallelConfig(size=2)), list(range(12))
    torch.manual_seed(100 + dist.get_rank())
    options = SAMPLERS[sampler](data)
    loader = DataLoader(data, **options, **({} if "batch_sampler" in options else {"batch_size": 2}))
    return [batch.tolist() for batch in cp.prepare_data_loader(loader)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_draw_alike(on_ranks, sampler):
    first, second, third, fourth = on_ranks(4, sampled, sampler)
    assert first == second and third == fourth
    assert sorted(sample for batch in first + third for sample in batch) == list(range(12))


def dealt_to_groups(iterable: bool, workers: int, spawned: bool) -> list[list[int]]:
    """List the samples of each batch, on 4 ranks in 2 CP groups."""
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2))
    torch.manual_seed(100 + dist.get_rank())  # every rank has another seed
    options = {"num_workers": workers, "multiprocessing_context": "spawn" if spawned else None}
    data = Stream() if iterable else list(range(12))
    loader = DataLoader(data, batch_size=2, shuffle=not iterable, **options)
    return [batch.tolist() for batch in cp.prepare_data_loader(loader)]


@pytest.mark.parametrize(
    ("iterable", "workers", "spawned"),
    [
        (False, 0, False),
        (False, 2, False),
        pytest.param(False, 1, True, marks=pytest.mark.exhaustive),
        (True, 0, False),
        (True, 1, False),
    ],
)
def test_ranks_of_a_group_get_the_same_samples(on_ranks, iterable, workers, spawned):
    first, second, third, fourth = on_ranks(4, dealt_to_groups, iterable, workers, spawned)
    assert first == second and third == fourth
    assert sorted(sample for batch in first + third for sample in batch) == list(range(12))


# Iterable data sets


class Plain(IterableDataset):
    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        return iter(samples_of([20] * self.count))


class Sized(Plain):
    def __len__(self) -> int:
        return self.count


def of_shards(shards: list[tuple[int, int]]):
    rows = samples_of([20] * max(stop for _, stop in shards))
    for start, stop in shards:
        yield from rows[start:stop]


def streamed(count: int) -> datasets.IterableDataset:
    """Iterable data set of two files, one of which has nearly twice as many samples."""
    split = -(-count * 9 // 14)
    return datasets.IterableDataset.from_generator(of_shards, gen_kwargs={"shards": [(0, split), (split, count)]})


DATA = {"plain": Plain, "sized": Sized, "streamed": streamed}


def trained(kind, folder, data, count, options) -> tuple[list[tuple[float, float]], float]:
    trainer = make_trainer(kind, folder, **options)
    trainer.train_dataset = DATA[data](count)
    trainer.train()
    history = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return history, trainer.state.epoch


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ("streamed", 14),
        pytest.param("streamed", 7, marks=pytest.mark.exhaustive),
        ("plain", 7),
        pytest.param("sized", 7, marks=pytest.mark.exhaustive),
    ],
)
def test_training_is_that_of_as_many_processes(on_ranks, tmp_path, data, count):
    options = {"gradient_accumulation_steps": 2, "max_steps": 6}  # more than an epoch
    expected, epoch = on_ranks(2, trained, STOCK, tmp_path, data, count, options)[0]
    for found, found_epoch in on_ranks(4, trained, 2, tmp_path, data, count, options):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert found_epoch == epoch


def evaluated(kind, folder, data, rows, workers) -> tuple[float, np.ndarray]:
    trainer = make_trainer(kind, folder, dataloader_num_workers=workers)
    trainer.args.per_device_eval_batch_size = rows
    predicted = trainer.predict(DATA[data](7))
    return predicted.metrics["test_loss"], predicted.label_ids


@pytest.mark.parametrize(
    ("data", "rows", "workers"),
    [
        ("plain", 1, 0),
        ("plain", 2, 0),
        ("plain", 3, 0),
        ("sized", 1, 0),
        ("streamed", 1, 0),
        pytest.param("streamed", 1, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_evaluation_counts_each_sample_once(on_ranks, tmp_path, data, rows, workers):
    loss, labels = on_ranks(2, evaluated, STOCK, tmp_path, data, rows, 0)[0]
    for found, seen in on_ranks(4, evaluated, 2, tmp_path, data, rows, workers):
        assert sorted(map(tuple, seen)) == sorted(map(tuple, labels))
        if not workers:  # two workers read the files side by side, so other samples share a batch
            np.testing.assert_allclose(found, loss, rtol=1e-5)
            np.testing.assert_array_equal(seen, labels)


def dealt(workers: int, per_group: int) -> list[list[int]]:
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2))
    data = datasets.IterableDataset.from_generator(numbers, gen_kwargs={"shards": [(0, 9), (9, 14)]})
    loader = DataLoader(data, batch_size=per_group, num_workers=workers, collate_fn=list)
    return [[row["number"] for row in batch] for batch in cp.prepare_data_loader(loader)]


def numbers(shards: list[tuple[int, int]]):
    for start, stop in shards:
        yield from ({"number": number} for number in range(start, stop))


@pytest.mark.parametrize(("workers", "per_group"), [(0, 1), (0, 3), (2, 2)])
def test_files_of_unequal_length_are_dealt_evenly(on_ranks, workers, per_group):
    first, second, third, fourth = on_ranks(4, dealt, workers, per_group)
    assert first == second and third == fourth
    assert [len(batch) for batch in first] == [len(batch) for batch in third]
    times = Counter(sample for batch in first + third for sample in batch)
    assert set(times) == set(range(14))
    # Each reading process repeats at most one sample, since two groups lack at most one.
    topped_up = max(workers, 1)
    assert sum(times.values()) <= 14 + topped_up


def drawn() -> list[int]:
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2))
    loader = cp.prepare_data_loader(DataLoader(Drawing(), batch_size=2))
    return [sample for batch in loader for sample in batch.tolist()]


class Drawing(IterableDataset):
    """Iterable data set of the numbers below 12, in an order drawn from a generator that differs by rank."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(torch.distributed.get_rank())

    def __iter__(self):
        return iter(torch.randperm(12, generator=self.generator).tolist())


def test_generators_of_data_sets_draw_alike(on_ranks):
    first, second, third, fourth = on_ranks(4, drawn)
    assert first == second and third == fourth
    assert sorted(first + third) == list(range(12))


def evaluated_after_resize(folder) -> list[tuple[float, int]]:
    trainer = make_trainer(4, folder, dataloader_num_workers=1, dataloader_persistent_workers=True)
    trainer.compute_metrics = lambda prediction: {"samples": len(prediction.predictions)}
    trainer.eval_dataset = samples(7)
    found = []
    for size in (4, 2):
        trainer.cp.resize(size)
        metrics = trainer.evaluate()
        found.append((metrics["eval_loss"], metrics["eval_samples"]))
    return found


def test_a_loader_that_outlives_a_smaller_size_counts_each_sample_once(on_ranks, tmp_path):
    for before, after in on_ranks(4, evaluated_after_resize, tmp_path):
        np.testing.assert_allclose(after, before, rtol=1e-5)
        assert after[1] == 7


def test_a_short_last_batch_is_topped_up_from_the_first_of_its_pass():
    groups = [type("Groups", (), {"data_rank": rank, "data_size": 3}) for rank in range(3)]
    dealers = [_Dealer(list, 6, mine, counted=True) for mine in groups]
    passes = [[[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]], [[10, 11, 12, 13, 14, 15], [16]]]
    got = [[dealer(list(batch)) for batch in batches for dealer in dealers] for batches in passes]
    assert [loaded.batch for loaded in got[0]] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [0, 1]]
    assert [loaded.counts for loaded in got[0][2:4]] == [[2, 2, 2], [2, 2, 0]]
    assert [loaded.batch for loaded in got[1][3:]] == [[16], [10], [11]]
    assert got[1][-1].counts == [1, 0, 0]
