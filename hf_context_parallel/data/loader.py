"""Data loaders that deal samples to CP groups: all ranks of a group get the same ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader as prepare
from accelerate.state import GradientState
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset

from ..distributed.process_groups import Groups


def prepare_data_loader(loader: DataLoader, groups: Groups, **options) -> DataLoader:
    """`accelerate.data_loader.prepare_data_loader` with CP groups in the place of processes.

    Batches are never dispatched from rank 0, which would collate the shards of all. Of an iterable data set every rank
    reads all samples and keeps its group's, in the order of a dispatching loader; accelerate would give each group
    files of its own where it can, of which one group may have more samples than another.

    Args:
        options: further ones of accelerate's function.
    """
    _share_seed(loader)
    share = {"num_processes": groups.data_size, "process_index": groups.data_rank}
    if isinstance(loader.dataset, IterableDataset) and loader.batch_size is not None and groups.data_size > 1:
        counted = options.get("put_on_device", False) and options.get("device") is not None
        size = loader.batch_size * (1 if options.get("split_batches") else groups.data_size)
        # Accelerate makes a new loader out of what this one says, which DataLoader itself does not let change.
        loader = copy.copy(loader)
        vars(loader).update(batch_size=size, collate_fn=_Dealer(loader.collate_fn, size, groups, counted))
        share = {"num_processes": 1, "process_index": 0}
    prepared = prepare(loader, **options, **share, dispatch_batches=False)
    prepared.groups = groups
    return prepared


class _Dealer:
    """Collates a group's part of the samples of all groups; in a worker process, of those that the worker reads.

    Samples that do not go round are topped up from the first ones, as a dispatching loader does.
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
            self._first = None  # that was the last of a pass over the data
        batch = self._collate(dealt[self._rank * share : (self._rank + 1) * share])
        return _Dealt(batch, counts) if self._counted else batch


class _Dealt(NamedTuple):
    """A batch on its way from a worker process, with how many of each group's samples are no top-up."""

    batch: Any
    counts: list[int]

    def to(self, device: torch.device, non_blocking: bool = False) -> Any:
        """The batch alone, on a device: accelerate calls this just before its loader yields the batch."""
        loader = GradientState().active_dataloader
        loader.counts = self.counts
        loader.remainder = 0  # gather_for_metrics cuts by the counts already
        return send_to_device(self.batch, device, non_blocking=non_blocking)


def _share_seed(loader: DataLoader) -> None:
    """Make samplers draw alike on all ranks: without a generator, or with a rank's own, each would its own order."""
    if not dist.is_initialized():
        return
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if hasattr(sampler, "generator"):
            if sampler.generator is None:
                sampler.generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
            _share_state(sampler.generator)
    if isinstance(loader.dataset, IterableDataset):
        generator = getattr(loader.dataset, "generator", None)
        if isinstance(generator, torch.Generator):
            _share_state(generator)


def _share_state(generator: torch.Generator) -> None:
    state = [generator.get_state()]
    dist.broadcast_object_list(state)
    generator.set_state(state[0])
