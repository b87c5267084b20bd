"""Tests of what the ranks of a group agree on before they choose a strategy."""

import pytest
import torch
import torch.distributed as dist

from hf_context_parallel import ContextParallel, ContextParallelConfig
from hf_context_parallel.attention import planner
from hf_context_parallel.attention.auto_strategy import choose
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.distributed import free_memory
from hf_context_parallel.planning import mask as masks
from tests.helpers.simulated import allowed, dense_attention

A, B = (0, 5, 20, 21, 40, 64), (0, 30, 64)
"""Edges of the documents of two rows."""


def choices_with_unequal_memory() -> tuple[list, int]:
    """Choose twice on each rank, the last of which has almost no free memory.

    Returns:
        The choices, and how often this rank looked at its memory.
    """
    made, looks = [], []

    def watched(*arguments):
        made.append(choose(*arguments))
        return made[-1]

    def free(device):
        looks.append(device)
        return 1 if cp.rank == cp.size - 1 else 2**50

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "choose", watched)
        patch.setattr(free_memory, "free_bytes", free)
        cp = ContextParallel(ContextParallelConfig(size=dist.get_world_size(), comm_type="auto"))
        for heads in (3, 6):
            x = torch.ones(1, heads, len(cp.positions(64)), 8, dtype=torch.float64, requires_grad=True)
            assert torch.allclose(cp.attention(x, x, x), x)
    return made, len(looks)


def test_ranks_choose_by_the_least_free_memory_which_they_compare_once(on_ranks):
    (first, looks), *others = on_ranks(3, choices_with_unequal_memory)
    assert others == [(first, looks)] * 2 and looks == 1
    assert all("NONE FITS" in choice.reason for choice in first)


def planned_again() -> tuple[list, list]:
    """Attend to packed rows a, b, a, c, a, where c has the documents of a and other heads.

    Returns:
        The masks that were planned, as the edges of their documents, and the largest error of each output.
    """
    planned, errors = [], []

    def watched(comm_type, inner, layout, mask, *more):
        planned.append([document[0][0] for document in mask.rows[0]])
        return build_strategy(comm_type, inner, layout, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "build_strategy", watched)
        cp = ContextParallel(ContextParallelConfig(size=dist.get_world_size(), comm_type="p2p", layout="zigzag"))
        for heads, edges in ((2, A), (2, B), (2, A), (4, A), (2, A)):
            cu_seqlens, random = torch.tensor(edges), torch.Generator().manual_seed(heads)
            x = torch.randn(1, 64, heads, 8, generator=random, dtype=torch.float64)
            mine = x[:, cp.positions(64, cu_seqlens)].transpose(1, 2)
            found = cp.attention(mine, mine, mine, cu_seqlens=cu_seqlens)
            seen = allowed(masks.Mask(64, (masks.from_cu_seqlens(cu_seqlens, 64),)))
            expected = dense_attention(x, x, x, seen, 8**-0.5)[0][:, cp.positions(64, cu_seqlens)].transpose(1, 2)
            errors.append((found - expected).abs().max().item())
    return planned, errors


def test_batches_that_are_alike_are_planned_once(on_ranks):
    for planned, errors in on_ranks(2, planned_again):
        assert planned == [list(A[:-1]), list(B[:-1])]  # the plan depends on no heads
        assert max(errors) < 1e-10


def test_free_memory_is_that_of_the_machine_shared_by_its_processes(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    whole = free_memory.free_bytes(device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert 0 < free_memory.free_bytes(device) < whole / 100
