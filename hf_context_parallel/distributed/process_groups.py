"""Process groups: of CP, of ranks that read the same samples, and of ranks with the same place in CP groups."""

from __future__ import annotations

import gc
import os
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .mesh import TENSOR_DIMENSION, Ranks, cp_blocks, device_of, has_nccl, ranks_of, world


@dataclass(frozen=True)
class Groups(Ranks):
    """CP group of this rank, and the process groups around it.

    Args:
        data_rank: number of the share of the samples that this rank reads.
        data_size: number of shares of the samples.
        first_ranks: for each share of the samples, the first rank of the world that reads it.
        tensor: the ranks of its tensor-parallel group, which hold other heads of the same tokens.
        same_batch: all ranks that read the same samples. These are the ranks of its CP group, and of other CP groups
            that hold other heads or layers.
        node: number of ranks of a CP group that share a machine, in the CP group where it is smallest.
        cores: number of CPU cores of the machine that has the fewest.
    """

    data_rank: int
    data_size: int
    first_ranks: list[int]
    tensor: Ranks
    same_batch: Ranks
    node: int = 1
    cores: int = 1


@cache
def _keep_garbage_in_forks() -> None:
    """Let processes that this one forks, such as data workers, never collect garbage that was made before.

    A group of gloo among it would wait for its threads, which a forked process does not have.
    """
    if hasattr(os, "register_at_fork"):  # Windows has no forks
        os.register_at_fork(after_in_child=gc.freeze)


def build_groups(size: int, mesh: DeviceMesh | None = None, divided: bool = False) -> Groups:
    """Make the CP groups. Every process of the world must call this with the same arguments.

    Without a mesh, CP groups are `size` consecutive ranks of the world. With one, they are its `cp` dimension, or
    `size` consecutive ranks along its data dimension (`fsdp`, `dp_shard` or `dp`; beyond it, along the replicas).

    Args:
        divided: True to make groups of `size` consecutive ranks of the `cp` dimension too.

    Raises:
        ValueError: if `torch.distributed` is not initialised, the sizes do not divide, or the mesh is a slice.
    """
    _keep_garbage_in_forks()
    if not dist.is_initialized():
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 or launched > 1:
            raise ValueError(
                f"size={size} with WORLD_SIZE={launched} needs torch.distributed, which is not initialised. Start the "
                "script with `accelerate launch` or `torchrun`, and make TrainingArguments, accelerate.PartialState() "
                "or torch.distributed.init_process_group() come first."
            )
        alone = world()
        return Groups(**vars(alone), data_rank=0, data_size=1, first_ranks=[0], tensor=alone, same_batch=alone)
    blocks = cp_blocks(size, mesh, divided)
    timeout = timeout_of_world()
    options = _transfers_first(timeout)
    group, _ = dist.new_subgroups_by_enumeration([ranks for ranks, _ in blocks], timeout, pg_options=options)
    me = dist.get_rank()
    ranks, data_rank = next(block for block in blocks if me in block[0])
    device = device_of(group)
    # All ranks of the world must choose by the same numbers, since schedules are made for the whole world.
    least = torch.tensor([_on_a_node(ranks), os.cpu_count() or 1], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)  # with NCCL, a group must not begin with p2p
    node, cores = least.tolist()
    firsts = {number: ranks[0] for ranks, number in reversed(blocks)}
    first_ranks = [firsts[number] for number in sorted(firsts)]
    mine = Ranks(group, ranks.index(me), size, device)
    tensor, same_batch = Ranks(None, 0, 1, device), mine
    if mesh is not None and TENSOR_DIMENSION in (mesh.mesh_dim_names or ()) and mesh[TENSOR_DIMENSION].size() > 1:
        tensor = ranks_of(mesh.get_group(TENSOR_DIMENSION))
    if len(blocks) > len(first_ranks):
        by_share = [
            [rank for block, share in blocks if share == number for rank in block] for number in sorted(firsts)
        ]
        same_batch = ranks_of(dist.new_subgroups_by_enumeration(by_share, timeout)[0])
    return Groups(
        **vars(mine),
        data_rank=data_rank,
        data_size=len(first_ranks),
        first_ranks=first_ranks,
        tensor=tensor,
        same_batch=same_batch,
        node=node,
        cores=cores,
    )


def _transfers_first(timeout: timedelta) -> Any:
    """Options of an NCCL group whose messages get free multiprocessors of a device before kernels do.

    Without them, a message that is posted while a kernel fills the device may wait for the end of that kernel.
    """
    if not has_nccl():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # or else torch warns that it differs
    return options


def _on_a_node(ranks: list[int]) -> int:
    """Largest number of these ranks on one machine, given the rank numbering of launchers."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return max(Counter(rank // local for rank in ranks).values())


def build_columns(size: int, mesh: DeviceMesh | None = None) -> dist.ProcessGroup:
    """Make the process group of the ranks that have this rank's place in CP groups of `size`.

    It has one rank for each share of the samples, in the order of the shares.

    Every process of the world must call this with the same arguments.
    """
    blocks = cp_blocks(size, mesh)
    shares = max(number for _, number in blocks) + 1
    columns: list[tuple[int, ...]] = []
    for first in range(0, len(blocks), shares):  # blocks of ranks that read all samples once
        columns += zip(*(ranks for ranks, _ in blocks[first : first + shares]))
    group: dist.ProcessGroup = dist.new_subgroups_by_enumeration(list(map(list, columns)), timeout_of_world())[0]
    return group


def timeout_of_world() -> timedelta:
    """Timeout of the world, since a new group would have the default timeout."""
    group = dist.group.WORLD
    assert group is not None  # groups are made after the world
    timeout: timedelta = group._get_backend(device_of(group)).options._timeout
    return timeout
