"""Refusals of groups that cannot be made."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import hf_context_parallel as hcp
from hf_context_parallel.attention.kernels import registry
from tests.helpers.models import context


def message_of_a_bad_size(sizes: list[int]) -> str:
    try:
        hcp.ContextParallel(hcp.ContextParallelConfig(size=sizes[dist.get_rank()]))
    except ValueError as refusal:
        return str(refusal)


def test_a_size_that_does_not_divide_the_world_is_refused(on_ranks):
    for message in on_ranks(3, message_of_a_bad_size, [2, 2, 2]):
        assert "size=2 does not divide the world size, which is 3" in message


def test_ranks_that_ask_for_different_sizes_are_told(on_ranks):
    messages = on_ranks(4, message_of_a_bad_size, [2, 2, 4, 4])
    assert len(set(messages)) == 1 and "rank 0 asks for CP groups of size=2 and rank 2 for size=4" in messages[0]


def test_a_group_without_torch_distributed_says_what_to_start():
    with pytest.raises(ValueError, match="accelerate launch"):
        hcp.ContextParallel(hcp.ContextParallelConfig(size=2))


def message_of_another_kernel(odd: int) -> list[str]:
    """Let `auto` stand for another kernel on one rank, as where a package is missing, and on all ranks thereafter."""
    before = registry.AUTOMATIC["cpu"]
    messages = []
    try:
        for ranks in ([odd], range(dist.get_world_size())):
            registry.AUTOMATIC["cpu"] = ("reference",) if dist.get_rank() in ranks else before
            registry.choose_kernel.cache_clear()
            try:
                messages.append(context().group.kernel(torch.device("cpu")).name)
            except ValueError as refusal:
                messages.append(str(refusal))
    finally:
        registry.AUTOMATIC["cpu"] = before
        registry.choose_kernel.cache_clear()
    return messages


def test_ranks_that_would_take_different_kernels_are_told(on_ranks):
    for differing, same in on_ranks(3, message_of_another_kernel, 2):
        assert "rank 0 would compute attention with kernel='cpu' and rank 2 with kernel='reference'" in differing
        assert "Install the same packages on all machines" in differing and same == "reference"


def test_a_kernel_that_is_missing_is_told_at_once():
    with pytest.raises(ValueError, match="kernel='torch' cannot be used: PyTorch sees no CUDA device"):
        context(kernel="torch")
