"""Process groups: of CP, of ranks that read the same samples, and of ranks with the same place in CP groups."""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..compat import lookup
from .leases import Lease
from .mesh import TENSOR_DIMENSION, Ranks, cp_blocks, device_of, has_nccl, ranks_of, world

MOST_BLOCKS = 8
"""Most blocks of threads (CTAs) of an operation of NCCL in a CP group. Each takes a multiprocessor from kernels.

Without a limit these are up to 32 over NVLink. A ring needs few: 16,384 tokens of 8 heads and 256 values (keys and
values of 128) in bfloat16 are 67 MB, and the kernels of such a step take about 6 ms on an H100, so 11 GB/s hide them.
One block moves more. The environment variable NCCL_MAX_CTAS takes precedence.
"""

LAUNCH_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"
"""Environment variable. With 1, a device runs operations of several communicators in the order of the host.

Otherwise the order may differ between ranks, since the streams of communicators wait for different events. Operations
of NCCL that wait for each other on two devices, with no multiprocessor left for the others, are a deadlock.
"""

logger = logging.getLogger(__name__)


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
    Lease.end_dropped()
    group = new_groups([ranks for ranks, _ in blocks], _transfers_first())
    me = dist.get_rank()
    ranks, data_rank = next(block for block in blocks if me in block[0])
    everyone = world()
    # All ranks of the world must choose by the same numbers, since schedules are made for the whole world.
    least = torch.tensor([_on_a_node(ranks), os.cpu_count() or 1], device=everyone.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    node, cores = least.tolist()
    firsts = {number: ranks[0] for ranks, number in reversed(blocks)}
    first_ranks = [firsts[number] for number in sorted(firsts)]
    mine = Ranks(group, ranks.index(me), size, everyone.device)
    tensor = Ranks(None, 0, 1, everyone.device)
    if mesh is not None and TENSOR_DIMENSION in (mesh.mesh_dim_names or ()) and mesh[TENSOR_DIMENSION].size() > 1:
        tensor = ranks_of(mesh.get_group(TENSOR_DIMENSION))
    readers = None
    if len(blocks) > len(first_ranks):
        by_share = [
            [rank for block, share in blocks if share == number for rank in block] for number in sorted(firsts)
        ]
        readers = new_groups(by_share)
        if group is not None:
            # With NCCL, a group must not begin with sends and receives. Elsewhere it begins with the agreement of its
            # ranks on a batch. Its communicator takes memory, so it is not made before it is needed.
            dist.all_reduce(least, group=group)
    lease = Lease([group, readers])
    mine = replace(mine, lease=lease)
    return Groups(
        **vars(mine),
        data_rank=data_rank,
        data_size=len(first_ranks),
        first_ranks=first_ranks,
        tensor=tensor,
        same_batch=mine if readers is None else replace(ranks_of(readers), lease=lease),
        node=node,
        cores=cores,
    )


def new_groups(blocks: list[list[int]], options: Any = None) -> dist.ProcessGroup | None:
    """Make a process group of each block of ranks, and return that of this rank; None for blocks of one rank.

    Every process of the world must call this with the same arguments. Other processes are waited for only where a
    communicator of the world is split, which is one collective operation for all blocks together.

    Args:
        blocks: the ranks of each group, ascending. The blocks are of one size, and hold each rank of the world once.
        options: options of the groups; None for the default ones.
    """
    if len(blocks[0]) == 1:
        return None
    timeout = timeout_of_world()
    everyone = dist.group.WORLD
    assert everyone is not None  # groups are made after the world
    group: dist.ProcessGroup | None
    if has_nccl() and everyone.bound_device_id is not None:
        group = dist.split_group(everyone, blocks, timeout, options)
    else:
        # torch names groups by a count that all processes share. With `use_local_synchronization` it would name them
        # by the number of groups that a process holds, which differs if a user has made groups of some ranks.
        group = dist.new_subgroups_by_enumeration(blocks, timeout, pg_options=options)[0]
    return group


def _transfers_first() -> Any:
    """Options of an NCCL group whose messages take few multiprocessors of a device, and get them before kernels do.

    Without the priority, a message that is posted while a kernel fills the device may wait for the end of that kernel.
    """
    if not has_nccl():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = MOST_BLOCKS
    options._timeout = timeout_of_world()  # or else torch warns that it differs
    return options


@cache
def recommend_launch_order() -> None:
    """Recommend `LAUNCH_ORDER` on rank 0, once, if communicators of CP and of FSDP run together without it.

    It cannot be set here, since NCCL reads it when the first communicator is made.
    """
    if has_nccl() and dist.get_rank() == 0 and os.environ.get(LAUNCH_ORDER) != "1":
        logger.warning(
            "CP and FSDP2 use several communicators of NCCL at a time, which may deadlock. Start "
            "the processes with %s=1 in their environment, which rules this out (since NCCL 2.26).",
            LAUNCH_ORDER,
        )


def _on_a_node(ranks: list[int]) -> int:
    """Largest number of these ranks on one machine, given the rank numbering of launchers."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return max(Counter(rank // local for rank in ranks).values())


def build_columns(size: int, mesh: DeviceMesh | None = None) -> Ranks:
    """Make the process group of the ranks that have this rank's place in CP groups of `size`.

    It has one rank for each share of the samples, in the order of the shares.

    Every process of the world must call this with the same arguments.
    """
    blocks = cp_blocks(size, mesh)
    shares = max(number for _, number in blocks) + 1
    columns: list[tuple[int, ...]] = []
    for first in range(0, len(blocks), shares):  # blocks of ranks that read all samples once
        columns += zip(*(ranks for ranks, _ in blocks[first : first + shares]))
    group = new_groups(list(map(list, columns)))
    return Ranks(None, 0, 1, world().device) if group is None else replace(ranks_of(group), lease=Lease([group]))


def set_timeout_of_world(timeout: timedelta) -> None:
    """Let messages of the world end after another time, and those of groups that are made from now on."""
    lookup("torch.distributed.distributed_c10d", "_set_pg_timeout", "ddp_timeout with use_cpu")(timeout)


def timeout_of_world() -> timedelta:
    """Timeout of the world, since a new group would have the default timeout."""
    group = dist.group.WORLD
    assert group is not None  # groups are made after the world
    timeout: timedelta = group._get_backend(device_of(group)).options._timeout
    return timeout
