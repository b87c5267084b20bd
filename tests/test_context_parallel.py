"""Refusals of groups that cannot be made, and the end of those that were."""

from __future__ import annotations

import gc
import os

import pytest
import torch
import torch.distributed as dist

import hf_context_parallel as hcp
from hf_context_parallel.attention.kernels import registry
from tests.helpers.models import context, tiny_model, tokens


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


A_FEW = 4
"""Files and threads that come and go: of the store, and of the loop of gloo. An object of two ranks has more."""


def held() -> list[int]:
    """Count open files, threads and process groups of this process."""
    gc.collect()
    return [len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")] + [
        len(dist.distributed_c10d._world.pg_map)
    ]


def held_after(objects: int, closed: bool) -> list[list[int]]:
    """Make objects of several sizes, use each, and close or drop it. Return what is held before and after."""
    query, counts = torch.randn(1, 2, 8, 16), []
    for number in range(-1, objects):  # one before, for what is made once, as the failure watch
        cp = context()
        with cp.shard({"input_ids": tokens(1, 16)}):
            cp.attention(query, query, query)
        with cp.using(1):
            pass
        if closed or number < 0:
            cp.close()
        if number < 0:
            counts.append(held())
    del cp
    if not closed:
        gc.collect()
        with context():  # making it frees those before
            pass
    return [*counts, held()]


@pytest.mark.parametrize("objects, closed", [(41, True), (11, False)])
def test_objects_leave_no_descriptor_thread_or_group(on_ranks, objects, closed):
    for before, after in on_ranks(2, held_after, objects, closed):
        assert after[0] <= before[0] + A_FEW and after[1] <= before[1] + A_FEW and after[2] == before[2] == 1


def dropped_by_one() -> list[int]:
    """Drop an object on rank 0 alone. The other rank still has it, so its group stays until both have dropped it."""
    kept, counts = [context()], []
    for rank in range(2):
        if rank == dist.get_rank():
            kept.clear()
            gc.collect()
        with context():
            counts.append(held()[2])
    return counts


def test_a_group_lives_until_all_ranks_have_dropped_it(on_ranks):
    assert on_ranks(2, dropped_by_one) == [[3, 2]] * 2


def messages_of_a_closed_one() -> list[str]:
    """Use a closed object in several ways, close another with an open batch, and use a prepared model without it."""
    cp, model, query = context(), tiny_model("llama", "context_parallel"), torch.randn(1, 2, 8, 16)
    hcp.parallelize(model, cp)
    batch = {"input_ids": tokens(1, 16)}
    output = cp.attention(query.requires_grad_(), query, query)
    groups = cp.groups
    cp.close()
    cp.close()
    uses = (
        lambda: cp.shard(batch),
        lambda: model(**batch),
        lambda: cp.attention(query, query, query),
        lambda: cp.resize(1),
        lambda: output.sum().backward(),
        lambda: dist.all_reduce(query, group=groups.group),
    )
    messages = []
    for use in uses:
        try:
            use()
        except (RuntimeError, ValueError) as refusal:
            messages.append(str(refusal))
    with context() as other, other.shard(batch):
        try:
            other.close()
        except RuntimeError as refusal:
            messages.append(str(refusal))
    return messages


def test_a_closed_object_says_so(on_ranks):
    for *closed, raw, open_batch in on_ranks(2, messages_of_a_closed_one):
        assert len(closed) == 5 and "group of a closed ContextParallel is not initialized" in raw
        for message in closed:
            assert "this ContextParallel is closed: its process groups are gone" in message
        assert "a batch is open" in open_batch
