"""Data loaders that deal samples to CP groups: all ranks of a group get the same ones."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader as prepare
from torch.utils.data import DataLoader

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
    """Make samplers draw alike on all ranks: without a generator, or with a rank's own, each would its own order."""
    if not dist.is_initialized():
        return
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if hasattr(sampler, "generator"):
            if sampler.generator is None:
                sampler.generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
            state = [sampler.generator.get_state()]
            dist.broadcast_object_list(state)
            sampler.generator.set_state(state[0])
