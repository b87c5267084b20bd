"""Process groups: which ranks share a sequence."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

CONTEXT_DIMENSION = "cp"
DATA_DIMENSIONS = ("fsdp", "dp_shard", "dp")
"""The mesh dimensions that CP may divide, by the names that Transformers, accelerate and torchtitan give them."""
REPLICATED_INPUT_DIMENSIONS = ("tp", "pp")
"""The mesh dimensions whose ranks see the same samples."""


@dataclass(frozen=True)
class Groups:
    """This rank's place.

    Args:
        group: the process group of its CP group, None where there is one process.
        rank, size: its rank in that group, and the group's ranks.
        data_rank, data_size: which share of the samples it gets, of how many.
        first_ranks: for each share of the samples, the first rank of the world that gets it.
        device: where tensors of collectives live.
        node: the most ranks of its CP group that share a machine.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    data_rank: int
    data_size: int
    first_ranks: list[int]
    device: torch.device
    node: int = 1


def world() -> Groups:
    """All processes as one group, which see the same samples."""
    if not dist.is_initialized():
        return Groups(None, 0, 1, 0, 1, [0], torch.device("cpu"))
    return Groups(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), 0, 1, [0], _device(dist.group.WORLD))


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


def build_groups(size: int, mesh: DeviceMesh | None = None) -> Groups:
    """Make the CP groups. Every process of the world must call this with the same arguments.

    Without a mesh, CP groups are `size` consecutive ranks of the world. With one, they are its `cp` dimension, or
    `size` consecutive ranks along its data dimension (`fsdp`, `dp_shard` or `dp`).

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
        return world()
    blocks = _blocks(size, mesh)
    everyone = dist.group.WORLD
    timeout = everyone._get_backend(_device(everyone)).options._timeout  # or else a new group has the default one
    group, _ = dist.new_subgroups_by_enumeration([ranks for ranks, _ in blocks], timeout)
    me = dist.get_rank()
    ranks, data_rank = next(block for block in blocks if me in block[0])
    device = _device(group)
    dist.all_reduce(torch.zeros(1, device=device), group=group)  # NCCL: point-to-point must not be a group's first use
    firsts = {number: ranks[0] for ranks, number in reversed(blocks)}
    first_ranks = [firsts[number] for number in sorted(firsts)]
    return Groups(group, ranks.index(me), size, data_rank, len(first_ranks), first_ranks, device, _on_a_node(ranks))


def _on_a_node(ranks: list[int]) -> int:
    """The most of these ranks that share a machine, as launchers number them."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return max(Counter(rank // local for rank in ranks).values())


def _blocks(size: int, mesh: DeviceMesh | None) -> list[tuple[list[int], int]]:
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
    extent = ranks.shape[names.index(along)]
    if extent % size or (along == CONTEXT_DIMENSION and extent != size):
        rule = "is not" if along == CONTEXT_DIMENSION else "does not divide"
        what = "the world size" if mesh is None else f"the mesh dimension {along!r}"
        raise ValueError(
            f"size={size} {rule} {what}, which is {extent}. Start a multiple of {size} processes, or choose "
            f"a size that is right for {extent}."
        )
    # Replicas of the model outermost and CP ranks innermost: the rows are CP groups, and a group's number is its row
    # within the dimensions whose ranks see different samples.
    shared = [names.index(name) for name in names if name in REPLICATED_INPUT_DIMENSIONS]
    other = [index for index, name in enumerate(names) if index not in shared and name != along]
    rows = ranks.permute(*shared, *other, names.index(along)).reshape(-1, size)
    copies = 1
    for index in shared:
        copies *= ranks.shape[index]
    return [(row, number % (len(rows) // copies)) for number, row in enumerate(rows.tolist())]


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors of the group's collectives must be."""
    if "nccl" in str(dist.get_backend_config(group)) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
