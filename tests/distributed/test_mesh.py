"""Tests of the ranks that make a CP group."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hf_context_parallel.distributed.process_groups import build_groups


def place(
    size: int, shape: tuple[int, ...] | None, names: tuple[str, ...]
) -> tuple[list[int], int, int, int, list[int]]:
    """Return the place of this rank: group, rank in it, share of the samples, shares, and first rank of each share."""
    mesh = None if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=names)
    groups = build_groups(size, mesh)
    ranks = [dist.get_rank()] if groups.group is None else dist.get_process_group_ranks(groups.group)
    return ranks, groups.rank, groups.data_rank, groups.data_size, groups.first_ranks


@pytest.mark.parametrize(
    ("size", "shape", "names", "groups", "shares", "first_ranks"),
    [
        (2, None, (), [[0, 1], [2, 3]], [0, 0, 1, 1], [0, 2]),
        (4, None, (), [[0, 1, 2, 3]], [0, 0, 0, 0], [0]),
        (1, None, (), [[0], [1], [2], [3]], [0, 1, 2, 3], [0, 1, 2, 3]),
        (2, (2, 2), ("dp", "cp"), [[0, 1], [2, 3]], [0, 0, 1, 1], [0, 2]),
        (2, (4,), ("fsdp",), [[0, 1], [2, 3]], [0, 0, 1, 1], [0, 2]),
        (2, (2, 2), ("fsdp", "tp"), [[0, 2], [1, 3]], [0, 0, 0, 0], [0]),
        (1, (2, 2), ("fsdp", "tp"), [[0], [1], [2], [3]], [0, 0, 1, 1], [0, 2]),
        (2, (2, 2), ("dp_replicate", "dp_shard"), [[0, 1], [2, 3]], [0, 0, 1, 1], [0, 2]),
    ],
)
def test_groups_lie_along_the_data_dimension(on_ranks, size, shape, names, groups, shares, first_ranks):
    for rank, found in enumerate(on_ranks(4, place, size, shape, names)):
        ranks, rank_in_group, share, count, firsts = found
        assert ranks in groups and ranks[rank_in_group] == rank
        assert (share, count, firsts) == (shares[rank], len(first_ranks), first_ranks)


def refusal(size: int, shape: tuple[int, ...], names: tuple[str, ...]) -> str:
    try:
        build_groups(size, init_device_mesh("cpu", shape, mesh_dim_names=names))
    except ValueError as caught:
        return str(caught)


@pytest.mark.parametrize(
    ("size", "shape", "names", "message"),
    [
        (4, (2, 2), ("fsdp", "tp"), "size=4 does not divide the mesh dimension 'fsdp', which is 2"),
        (1, (2, 2), ("dp", "cp"), "size=1 is not the mesh dimension 'cp'"),
        (2, (2, 2), ("pp", "tp"), "none that CP can use. Make a mesh with a dimension called 'cp'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(on_ranks, size, shape, names, message):
    for found in on_ranks(4, refusal, size, shape, names):
        assert message in found


def node_of_pairs(ranks_of_a_machine: int) -> int:
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_of_a_machine)
    return build_groups(2).node


def test_all_ranks_of_the_world_choose_by_the_same_numbers(on_ranks):
    """Put ranks 0 to 2 on one machine and rank 3 on another, so that one of two groups is on two machines."""
    assert on_ranks(4, node_of_pairs, 3) == [1, 1, 1, 1]
