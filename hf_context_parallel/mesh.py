"""Process groups: which ranks share a sequence."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

CONTEXT_DIMENSION = "cp"
DATA_DIMENSIONS = ("fsdp", "dp_shard", "dp")
"""The mesh dimensions that CP may divide, by the names that Transformers, accelerate and torchtitan give them."""
TENSOR_DIMENSION = "tp"
REPLICATED_INPUT_DIMENSIONS = (TENSOR_DIMENSION, "pp")
"""The mesh dimensions whose ranks see the same samples."""


@dataclass(frozen=True)
class Ranks:
    """Processes that work together, this one among them.

    Args:
        group: their process group; None where there is none to make, since no process group was initialised, or for a
            dimension that has one rank.
        rank, size: this one's rank among them, and how many they are.
        device: where tensors of their collectives live.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    device: torch.device


@dataclass(frozen=True)
class Groups(Ranks):
    """This rank's place: the ranks of its CP group, and those around it.

    Args:
        data_rank, data_size: which share of the samples it gets, of how many.
        first_ranks: for each share of the samples, the first rank of the world that gets it.
        tensor: the ranks of its tensor-parallel group, which hold other heads of the same tokens.
        alike: all ranks that see the same samples: those of its CP group, and of the CP groups beside it that hold
            other heads or layers.
        node: the most ranks of a CP group that share a machine, of the group where that is fewest.
        cores: of the machine that has fewest.
    """

    data_rank: int
    data_size: int
    first_ranks: list[int]
    tensor: Ranks
    alike: Ranks
    node: int = 1
    cores: int = 1


def world() -> Ranks:
    """All processes."""
    if not dist.is_initialized():
        return Ranks(None, 0, 1, torch.device("cpu"))
    return _ranks(dist.group.WORLD)


def _ranks(group: dist.ProcessGroup) -> Ranks:
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group), _device(group))


def mesh_of(model: torch.nn.Module) -> DeviceMesh | None:
    """The mesh by which Transformers sharded a model as it loaded it, for `ContextParallel(config, mesh)`.

    Returns:
        A mesh with the dimensions `fsdp` and `tp` among others; None if the model was not loaded with a
        `DistributedConfig` of more than one process.
    """
    for module in model.modules():
        manager = getattr(module, "_mesh_manager", None)
        if manager is not None:
            return manager.get_mesh(("pp", "dp_replicate", "fsdp", "tp"))
        if getattr(module, "_device_mesh", None) is not None:  # Transformers before 5.20
            return module._device_mesh
    return None


def build_groups(size: int, mesh: DeviceMesh | None = None, divided: bool = False) -> Groups:
    """Make the CP groups. Every process of the world must call this with the same arguments.

    Without a mesh, CP groups are `size` consecutive ranks of the world. With one, they are its `cp` dimension, or
    `size` consecutive ranks along its data dimension (`fsdp`, `dp_shard` or `dp`; beyond it, along the replicas).

    Args:
        divided: make them of `size` consecutive ranks of the `cp` dimension too.

    Raises:
        ValueError: if there is no process group, the sizes do not divide, or the mesh is of some of the world's ranks.
    """
    if not dist.is_initialized():
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 or launched > 1:
            raise ValueError(
                f"size={size} with WORLD_SIZE={launched} needs torch.distributed, which is not initialised. Start the "
                "script with `accelerate launch` or `torchrun`, and make TrainingArguments, accelerate.PartialState() "
                "or torch.distributed.init_process_group() come first."
            )
        alone = world()
        return Groups(**vars(alone), data_rank=0, data_size=1, first_ranks=[0], tensor=alone, alike=alone)
    blocks = _blocks(size, mesh, divided)
    timeout = _timeout()
    options = _transfers_first(timeout)
    group, _ = dist.new_subgroups_by_enumeration([ranks for ranks, _ in blocks], timeout, pg_options=options)
    me = dist.get_rank()
    ranks, data_rank = next(block for block in blocks if me in block[0])
    device = _device(group)
    # All ranks choose by the same numbers: of the world, since schedules are the world's.
    least = torch.tensor([_on_a_node(ranks), os.cpu_count() or 1], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)  # with NCCL p2p must not be a group's first use
    node, cores = least.tolist()
    firsts = {number: ranks[0] for ranks, number in reversed(blocks)}
    first_ranks = [firsts[number] for number in sorted(firsts)]
    mine = Ranks(group, ranks.index(me), size, device)
    tensor, alike = Ranks(None, 0, 1, device), mine
    if mesh is not None and TENSOR_DIMENSION in mesh.mesh_dim_names and mesh[TENSOR_DIMENSION].size() > 1:
        tensor = _ranks(mesh.get_group(TENSOR_DIMENSION))
    if len(blocks) > len(first_ranks):
        by_share = [
            [rank for block, share in blocks if share == number for rank in block] for number in sorted(firsts)
        ]
        alike = _ranks(dist.new_subgroups_by_enumeration(by_share, timeout)[0])
    return Groups(
        **vars(mine),
        data_rank=data_rank,
        data_size=len(first_ranks),
        first_ranks=first_ranks,
        tensor=tensor,
        alike=alike,
        node=node,
        cores=cores,
    )


def _transfers_first(timeout: timedelta):
    """Options of a group whose messages get a device's free multiprocessors before kernels do. Without them a message
    that is posted while a kernel fills the device may wait for the kernel that it should travel beside."""
    if not _has_nccl():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # or else torch warns that it differs
    return options


def _on_a_node(ranks: list[int]) -> int:
    """The most of these ranks that share a machine, as launchers number them."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return max(Counter(rank // local for rank in ranks).values())


def build_columns(size: int, mesh: DeviceMesh | None = None) -> dist.ProcessGroup:
    """The ranks with this one's place in CP groups of `size`, one of each share of the samples, in their order.

    Every process of the world must call this with the same arguments.
    """
    blocks = _blocks(size, mesh)
    shares = max(number for _, number in blocks) + 1
    columns = []
    for first in range(0, len(blocks), shares):  # each copy of the samples
        columns += zip(*(ranks for ranks, _ in blocks[first : first + shares]))
    group, _ = dist.new_subgroups_by_enumeration([list(column) for column in columns], _timeout())
    return group


def _timeout() -> timedelta:
    """The world's: a new group would have the default one."""
    return dist.group.WORLD._get_backend(_device(dist.group.WORLD)).options._timeout


def _blocks(size: int, mesh: DeviceMesh | None, divided: bool = False) -> list[tuple[list[int], int]]:
    """Every CP group of the world: its ranks, and which share of the samples it gets."""
    if mesh is None:
        names, ranks = ("dp",), torch.arange(dist.get_world_size())
    else:
        names, ranks = tuple(mesh.mesh_dim_names or ()), mesh.mesh
    along = next((name for name in (CONTEXT_DIMENSION, *DATA_DIMENSIONS) if name in names), None)
    if along is None:
        raise ValueError(
            f"the mesh has dimensions {names}: CP needs one called {CONTEXT_DIMENSION!r}, or a data dimension to "
            f"divide, called {' or '.join(map(repr, DATA_DIMENSIONS))}."
        )
    if ranks.numel() != dist.get_world_size():
        raise ValueError(
            f"the mesh has {ranks.numel()} ranks and the world {dist.get_world_size()}: every process makes the same "
            "groups, so give CP the whole mesh and not a slice of it."
        )
    # Replicas of the model outermost and CP ranks innermost: the rows are CP groups, and a group's number is its row
    # within the dimensions whose ranks see different samples.
    shared = [names.index(name) for name in names if name in REPLICATED_INPUT_DIMENSIONS]
    other = [index for index, name in enumerate(names) if index not in shared and name != along]
    extent = ranks.shape[names.index(along)]
    copies = prod(ranks.shape[index] for index in shared)
    shares = ranks.numel() // copies
    whole = along == CONTEXT_DIMENSION and not divided
    fits = extent == size if whole else not (extent % size and (size % extent or shares % size))
    if not fits:
        if whole:
            raise ValueError(
                f"size={size} is not the mesh dimension {along!r}, which is {extent}. Set size={extent}, or make the "
                f"mesh with {size} ranks along it."
            )
        what = "the world size" if mesh is None else f"the mesh dimension {along!r}"
        raise ValueError(
            f"size={size} does not divide {what}, which is {extent}. Start a multiple of {size * copies} processes, "
            f"or choose a size that is right for {extent}."
        )
    rows = ranks.permute(*shared, *other, names.index(along)).reshape(-1, size)
    return [(row, number % (len(rows) // copies)) for number, row in enumerate(rows.tolist())]


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors of the group's collectives must be."""
    if _has_nccl(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _has_nccl(group: dist.ProcessGroup | None = None) -> bool:
    return torch.cuda.is_available() and "nccl" in str(dist.get_backend_config(group))
