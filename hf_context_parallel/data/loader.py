"""Data loaders that deal samples to CP groups: all ranks of a group get the same samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader as prepare
from torch.utils.data import DataLoader, IterableDataset

from ..distributed.agreement import fingerprint, gather_numbers, odd_rank
from ..distributed.mesh import world
from ..distributed.process_groups import Groups
from .ahead import Loaded, PlanAhead, Planner


def prepare_data_loader(
    loader: DataLoader, groups: Groups, planner: Planner | None = None, **options: Any
) -> DataLoader:
    """Prepare a data loader as `accelerate.data_loader.prepare_data_loader` does, for CP groups instead of processes.

    Batches are never dispatched from rank 0, because rank 0 would then collate the shards of all ranks. From an
    iterable data set every rank reads all samples and keeps those of its group, in the order of a dispatching loader.
    Accelerate would split the files of the data set between groups, and one group could get more samples than another.

    If the loader puts batches on a device, it also plans attention of each batch ahead of its step, and the host
    remembers the values of the batch.

    Args:
        loader: the loader of whole batches.
        groups: the process groups of this rank.
        planner: the planner of this rank; None to plan nothing ahead.
        options: further options of accelerate's function.
    """
    _share_seed(loader)
    share = {"num_processes": groups.data_size, "process_index": groups.data_rank}
    shared = groups.data_size > 1 or groups.same_batch.size > 1
    size, collate = loader.batch_size, loader.collate_fn
    moves = options.get("put_on_device", False) and options.get("device") is not None
    if isinstance(loader.dataset, IterableDataset) and size is not None and shared:
        size *= 1 if options.get("split_batches") else groups.data_size
        collate = _Dealer(collate, size, groups, counted=moves)
        share = {"num_processes": 1, "process_index": 0}
    if moves:
        collate = PlanAhead(collate, planner)
    # Accelerate makes a new loader from the attributes of this one, and DataLoader forbids setting them.
    loader = copy.copy(loader)
    vars(loader).update(batch_size=size, collate_fn=collate)
    prepared = prepare(loader, **options, **share, dispatch_batches=False)
    prepared.groups = groups
    return prepared


class _Dealer:
    """Collate function that takes the samples of all groups and collates those of one group.

    If the number of groups does not divide the number of the last samples of a pass, the first samples are repeated,
    as a dispatching loader does. Each worker process has its own copy, and repeats samples that it has read itself.
    """

    def __init__(self, collate: Callable[[list], Any], size: int, groups: Groups, counted: bool):
        self._collate, self._size, self._counted = collate, size, counted
        self._rank, self._groups = groups.data_rank, groups.data_size
        self._first: list | None = None

    def __call__(self, samples: list) -> Any:
        if self._first is None:
            self._first = samples[: self._groups]
        share = -(-len(samples) // self._groups)
        dealt = samples + list(islice(cycle(self._first), share * self._groups - len(samples)))
        counts = [min(max(len(samples) - group * share, 0), share) for group in range(self._groups)]
        if len(samples) < self._size:
            self._first = None  # this was the last batch of a pass over the data
        batch = self._collate(dealt[self._rank * share : (self._rank + 1) * share])
        return Loaded(batch, counts) if self._counted else batch


def _share_seed(loader: DataLoader) -> None:
    """Give all ranks the same random state for samplers; otherwise each rank would draw an order of its own."""
    if not dist.is_initialized():
        return
    alike = _draw_alike()
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if hasattr(sampler, "generator"):
            if sampler.generator is None:
                if alike:
                    continue  # the sampler draws from the stream of the process, as without CP
                with torch.random.fork_rng(devices=[]):  # without CP nothing is drawn here
                    seed = int(torch.empty((), dtype=torch.int64).random_())
                sampler.generator = torch.Generator().manual_seed(seed)
            _share_state(sampler.generator)
    if isinstance(loader.dataset, IterableDataset):
        generator = getattr(loader.dataset, "generator", None)
        if isinstance(generator, torch.Generator):
            _share_state(generator)


def _draw_alike() -> bool:
    """Return whether all ranks have the same random state of torch, as the Trainer seeds them. All ranks call this."""
    [states] = gather_numbers(world(), fingerprint({"state": torch.get_rng_state()}))
    return odd_rank(states) is None


def _share_state(generator: torch.Generator) -> None:
    state = [generator.get_state()]
    dist.broadcast_object_list(state)
    generator.set_state(state[0])
