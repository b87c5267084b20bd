"""Meshes of some GPUs."""

import pytest

from hf_context_parallel.sizing.meshes import Mesh, meshes


def sizes(found):
    return sorted({(mesh.tp, mesh.cp, mesh.fsdp) for mesh in found})


def test_meshes_of_four_gpus():
    found = list(meshes(4, 8, 32, 8))
    assert sizes(found) == [
        *((1, cp, fsdp) for cp in (1, 2, 4) for fsdp in (1, 2, 4)),
        *((2, cp, fsdp) for cp in (1, 2) for fsdp in (1, 2)),
        (4, 1, 1),
    ]
    assert all(mesh.ranks == 4 for mesh in found)
    assert all(mesh.groups * mesh.cp * mesh.tp == 4 for mesh in found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "gpus, node, heads, key_heads, may_shard, largest",
    [
        (8, 8, 32, 8, True, 8),
        (8, 8, 32, 2, True, 2),  # two key heads
        (8, 8, 9, 3, True, 1),
        (16, 4, 32, 16, True, 4),  # nodes of four
        (8, 8, 32, 8, False, 1),
    ],
)
def test_the_largest_tensor_parallel_size(gpus, node, heads, key_heads, may_shard, largest):
    assert max(mesh.tp for mesh in meshes(gpus, node, heads, key_heads, may_shard)) == largest


def test_strategies_follow_the_heads_of_a_rank():
    found = {(mesh.comm_type, mesh.inner) for mesh in meshes(8, 8, 4, 2) if (mesh.tp, mesh.cp) == (1, 8)}
    assert found == {("p2p", 1), ("all_gather", 1), ("a2a+p2p", 2), ("a2a+p2p", 4)}  # 4 heads are not enough for a2a
    assert ("a2a", 8) in {(mesh.comm_type, mesh.inner) for mesh in meshes(8, 8, 8, 2)}


def test_of_many_gpus_fsdp_is_over_none_a_node_or_all():
    found = {mesh.fsdp for mesh in meshes(64, 8, 32, 8) if mesh.tp == 2}
    assert found == {1, 4, 32}


def test_groups_and_words_of_a_mesh():
    mesh = Mesh(2, 4, 4, 2)
    assert (mesh.ranks, mesh.groups) == (16, 2)
    assert str(mesh) == "TP 2 x CP 4, FSDP 4, 2 replicas"


def test_a_cp_group_is_a_part_of_fsdp_ranks_or_some_of_them_whole():
    assert {mesh.fsdp for mesh in meshes(6, 8, 32, 8) if (mesh.tp, mesh.cp) == (1, 2)} == {1, 2, 6}
