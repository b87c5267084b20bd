"""Tests of what the ranks of a group agree on before they choose a strategy."""

import pytest
import torch
import torch.distributed as dist

from hf_context_parallel import ContextParallel, ContextParallelConfig, cp_group
from hf_context_parallel.attention.auto_strategy import choose
from hf_context_parallel.distributed import free_memory


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
        patch.setattr(cp_group, "choose", watched)
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


def test_free_memory_is_that_of_the_machine_shared_by_its_processes(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    whole = free_memory.free_bytes(device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert 0 < free_memory.free_bytes(device) < whole / 100
