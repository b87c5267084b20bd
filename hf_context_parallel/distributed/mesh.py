"""Assignment of ranks to CP groups, by their order in the world or by a mesh."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..compat import mesh_of_loading

CONTEXT_DIMENSION = "cp"
DATA_DIMENSIONS = ("fsdp", "dp_shard", "dp")
"""Mesh dimensions that CP may divide, by their names in Transformers, accelerate and torchtitan."""
TENSOR_DIMENSION = "tp"
REPLICATED_INPUT_DIMENSIONS = (TENSOR_DIMENSION, "pp")
"""Mesh dimensions whose ranks read the same samples."""


@dataclass(frozen=True)
class Ranks:
    """Ranks of a process group, of which this process is one.

    Args:
        group: the process group. None for one rank, also where `torch.distributed` is not initialised.
        rank: the rank of this process in the group.
        size: the number of ranks of the group.
        device: the device that tensors of collectives must be on.
        lease: keeps the group alive, if it was made here.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    device: torch.device
    lease: object = field(default=None, compare=False, repr=False, kw_only=True)


def world() -> Ranks:
    """Ranks of the world: all processes."""
    group = dist.group.WORLD
    if group is None:  # torch.distributed is not initialised
        return Ranks(None, 0, 1, torch.device("cpu"))
    return ranks_of(group)


def ranks_of(group: dist.ProcessGroup) -> Ranks:
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group), device_of(group))


def mesh_of(model: torch.nn.Module) -> DeviceMesh | None:
    """Mesh by which Transformers sharded a model while loading it, for `ContextParallel(config, mesh)`.

    Returns:
        A mesh with the dimensions `fsdp` and `tp` among others; None if the model was not loaded with a
        `DistributedConfig` of more than one process.
    """
    for module in model.modules():
        mesh = mesh_of_loading(module)
        if mesh is not None:
            return mesh
    return None


def cp_blocks(size: int, mesh: DeviceMesh | None, divided: bool = False) -> list[tuple[list[int], int]]:
    """List all CP groups of the world.

    Args:
        size: ranks of a group.
        mesh: the mesh of the whole world, or None for groups of consecutive ranks.
        divided: True to divide the `cp` dimension of the mesh too.

    Returns:
        The ranks of each group, and the number of the share of the samples that it reads.

    Raises:
        ValueError: if the mesh has no dimension for CP, is not of all ranks, or does not fit `size`.
    """
    names: tuple[str, ...]
    if mesh is None:
        names, ranks = ("dp",), torch.arange(dist.get_world_size())
    else:
        names, ranks = tuple(mesh.mesh_dim_names or ()), mesh.mesh
    along = next((name for name in (CONTEXT_DIMENSION, *DATA_DIMENSIONS) if name in names), None)
    if along is None:
        raise ValueError(
            f"the mesh has dimensions {names}, and none that CP can use. Make a mesh with a dimension called "
            f"{CONTEXT_DIMENSION!r}, or a data dimension called {' or '.join(map(repr, DATA_DIMENSIONS))}."
        )
    if ranks.numel() != dist.get_world_size():
        raise ValueError(
            f"the mesh has {ranks.numel()} ranks, but the world has {dist.get_world_size()}. Give CP the whole mesh "
            "and not a slice of it, since every process makes the same groups."
        )
    # Dimensions that read the same samples come first and CP ranks last. So the rows are CP groups. The number of a
    # group is its row within the dimensions whose ranks read different samples.
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
                f"size={size} is not the mesh dimension {along!r}, which is {extent}. Set size={extent}, or make a "
                f"mesh with {size} ranks along it."
            )
        what = "the world size" if mesh is None else f"the mesh dimension {along!r}"
        raise ValueError(
            f"size={size} does not divide {what}, which is {extent}. Start a multiple of {size * copies} processes, "
            f"or choose a size that divides {extent}."
        )
    rows = ranks.permute(*shared, *other, names.index(along)).reshape(-1, size)
    # Process groups number their ranks in ascending order, whatever the order of a mesh.
    return [(sorted(row), number % (len(rows) // copies)) for number, row in enumerate(rows.tolist())]


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Device that tensors of the group's collectives must be on."""
    if has_nccl(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def has_nccl(group: dist.ProcessGroup | None = None) -> bool:
    return torch.cuda.is_available() and "nccl" in str(dist.get_backend_config(group))
