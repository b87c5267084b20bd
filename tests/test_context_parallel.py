"""Refusals of groups that cannot be made."""

from __future__ import annotations

import pytest
import torch.distributed as dist

import hf_context_parallel as hcp
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


def test_a_kernel_that_is_missing_is_told_at_once():
    with pytest.raises(ValueError, match="kernel='torch' cannot be used: PyTorch sees no CUDA device"):
        context(kernel="torch")
