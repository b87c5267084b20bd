"""Data loaders that deal samples to CP groups: all ranks of a group get the same ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader as prepare
from torch.utils.data import DataLoader, RandomSampler

from .mesh import Groups


def prepare_data_loader(loader: DataLoader, groups: Groups, **options) -> DataLoader:
    """`accelerate.data_loader.prepare_data_loader` with CP groups in the place of processes.

    Batches are never dispatched from rank 0, which would collate the shards of all.

    Args:
        options: further ones of accelerate's function.
    """
    _share_seed(loader)
    options |= {"num_processes": groups.data_size, "process_index": groups.data_rank, "dispatch_batches": False}
    return prepare(loader, **options)


def _share_seed(loader: DataLoader) -> None:
    """Shuffle alike on all ranks: a random sampler without a generator would draw its own order in every process."""
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler) and sampler.generator is None and dist.is_initialized():
        seed = [int(torch.empty((), dtype=torch.int64).random_())]
        dist.broadcast_object_list(seed)
        sampler.generator = torch.Generator().manual_seed(seed[0])
