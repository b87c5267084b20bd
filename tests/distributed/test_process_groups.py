"""Process groups: their number, their options, and those of processes that fork."""

from __future__ import annotations

import gc
import os
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hf_context_parallel.distributed import process_groups
from hf_context_parallel.distributed.process_groups import build_columns, build_groups, new_groups
from tests.helpers.models import context


def groups_of_a_process() -> int:
    """Count the groups that this process is in, the world included."""
    return len(dist.distributed_c10d._world.pg_names)


def counts_of_groups() -> list[int]:
    counts, kept = [groups_of_a_process()], []
    for size in (1, 2, 4):
        kept.append(build_groups(size))
        counts.append(groups_of_a_process())
    build_columns(4)  # of one rank each
    cp = context()
    counts.append(groups_of_a_process())
    for size in (1, 2, 1, 2):
        with cp.using(size):
            assert (cp.groups.group is None) == (cp.groups.same_batch.group is None) == (size == 1)
    return [*counts, groups_of_a_process()]


def test_a_group_of_one_rank_has_no_communicator(on_ranks):
    """Check sizes 1, 2 and 4, a `ContextParallel` of size 4, and its groups of sizes 1 and 2."""
    assert on_ranks(4, counts_of_groups) == [[1, 1, 2, 3, 4, 5]] * 4


def sums_in_groups() -> list[list[int]]:
    """Make groups of the same ranks twice, after some ranks alone have made a group. Sum the ranks in each group."""
    me, sums = dist.get_rank(), []
    if me in (1, 2):
        dist.new_group([1, 2], use_local_synchronization=True)
    for blocks in ([[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 1], [2, 3]]):
        group, total = new_groups(blocks), torch.tensor(2**me)
        dist.all_reduce(total, group=group)
        sums.append(int(total))
    return sums


def test_groups_of_the_same_ranks_and_beside_groups_of_a_user(on_ranks):
    assert on_ranks(4, sums_in_groups) == [[3, 5, 3], [3, 10, 3], [12, 5, 12], [12, 10, 12]]


def place_in_a_mesh_out_of_order() -> list[int]:
    groups = build_groups(2, DeviceMesh("cpu", [[1, 0], [3, 2]], mesh_dim_names=("dp", "cp")))
    return [groups.rank, dist.get_rank(groups.group)]


def test_ranks_have_one_number_in_a_group_whatever_the_order_of_the_mesh(on_ranks):
    assert on_ranks(4, place_in_a_mesh_out_of_order) == [[0, 0], [1, 1], [0, 0], [1, 1]]


def with_fake_nccl(monkeypatch, bound_to: torch.device | None) -> list:
    """Let groups be those of a world with NCCL that may be bound to a device. Return the calls that make groups."""
    calls = []
    options = SimpleNamespace(
        ProcessGroupNCCL=SimpleNamespace(
            Options=lambda is_high_priority_stream: SimpleNamespace(
                is_high_priority_stream=is_high_priority_stream, config=SimpleNamespace(max_ctas=None)
            )
        ),
        group=SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=bound_to)),
        split_group=lambda *args: calls.append(("split", *args)) or "split",
        new_subgroups_by_enumeration=lambda *args, **how: calls.append(("new", *args, how)) or ("new", []),
    )
    monkeypatch.setattr(process_groups, "dist", options)
    monkeypatch.setattr(process_groups, "has_nccl", lambda: True)
    monkeypatch.setattr(process_groups, "timeout_of_world", lambda: timedelta(seconds=7))
    return calls


def test_one_split_makes_all_groups_of_a_world_that_is_bound_to_a_device(monkeypatch):
    calls = with_fake_nccl(monkeypatch, torch.device("cuda", 0))
    assert new_groups([[0, 1], [2, 3]], "options") == "split"
    world = process_groups.dist.group.WORLD
    assert calls == [("split", world, [[0, 1], [2, 3]], timedelta(seconds=7), "options")]
    assert new_groups([[0], [1], [2], [3]], "options") is None and len(calls) == 1


def test_nccl_groups_take_few_multiprocessors_and_go_first(monkeypatch):
    calls = with_fake_nccl(monkeypatch, None)
    options = process_groups._transfers_first()
    assert (options.config.max_ctas, options.is_high_priority_stream) == (8, True)
    assert options._timeout == timedelta(seconds=7)
    assert new_groups([[0, 1]], options) == "new"
    assert calls == [("new", [[0, 1]], timedelta(seconds=7), {"pg_options": options})]


def status_of_a_fork() -> int | None:
    """Fork a process that collects garbage, among which are groups. Return its exit status, or None if it hangs."""
    gc.disable()  # so that the groups wait for the fork
    cycle = [context()]
    cycle.append(cycle)
    del cycle
    dist.destroy_process_group()  # which PyTorch holds till then
    child = os.fork()
    if not child:
        gc.collect()
        os._exit(0)
    gc.enable()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def test_a_fork_leaves_the_groups_of_its_parent_alone(on_ranks):
    assert on_ranks(2, status_of_a_fork) == [0, 0]


@pytest.mark.parametrize(("given", "said"), [("0", 1), ("1", 0)])
def test_the_order_of_launches_is_recommended_once(monkeypatch, caplog, given, said):
    with_fake_nccl(monkeypatch, None)
    process_groups.dist.get_rank = lambda: 0
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", given)
    process_groups.recommend_launch_order.cache_clear()
    process_groups.recommend_launch_order()
    process_groups.recommend_launch_order()
    assert caplog.text.count("NCCL_LAUNCH_ORDER_IMPLICIT=1") == said
