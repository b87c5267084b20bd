"""Which ranks share a sequence: by their order, or by a mesh."""

from __future__ import annotations

from dataclasses import dataclass
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


def world() -> Ranks:
    """All processes."""
    group = dist.group.WORLD
    if group is None:  # torch.distributed is not initialised
        return Ranks(None, 0, 1, torch.device("cpu"))
    return ranks_of(group)


def ranks_of(group: dist.ProcessGroup) -> Ranks:
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group), device_of(group))


def mesh_of(model: torch.nn.Module) -> DeviceMesh | None:
    """The mesh by which Transformers sharded a model as it loaded it, for `ContextParallel(config, mesh)`.

    Returns:
        A mesh with the dimensions `fsdp` and `tp` among others; None if the model was not loaded with a
        `DistributedConfig` of more than one process.
    """
    for module in model.modules():
        manager = getattr(module, "_mesh_manager", None)
        if manager is not None:
            found: DeviceMesh | None = manager.get_mesh(("pp", "dp_replicate", "fsdp", "tp"))
            return found
        mesh = getattr(module, "_device_mesh", None)  # Transformers before 5.20
        if isinstance(mesh, DeviceMesh):
            return mesh
    return None


def cp_blocks(size: int, mesh: DeviceMesh | None, divided: bool = False) -> list[tuple[list[int], int]]:
    """Every CP group of the world: its ranks, and which share of the samples it gets."""
    names: tuple[str, ...]
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


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where tensors of the group's collectives must be."""
    if has_nccl(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def has_nccl(group: dist.ProcessGroup | None = None) -> bool:
    return torch.cuda.is_available() and "nccl" in str(dist.get_backend_config(group))
