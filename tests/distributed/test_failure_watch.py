"""Tests of ranks whose wait for a failed rank does not end by itself, as over NCCL: the failure watch ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch.distributed as dist

import hf_context_parallel as hcp
from hf_context_parallel.distributed import failures
from hf_context_parallel.distributed.failure_watch import FailureWatch
from tests.helpers.models import context, tokens

SECONDS = 60.0
"""Seconds after which a wait in these tests ends although nobody has ended it."""
INTERVAL, PATIENCE = 0.05, 0.2
BATCH = {"input_ids": tokens(1, 16)}


@contextmanager
def waits_without_end() -> Iterator[threading.Event]:
    """Let waits of this process end only when the watch aborts them, which sets the event."""
    aborted = threading.Event()
    watch = partial(FailureWatch, aborted.set, INTERVAL, PATIENCE)
    with patch.object(failures, "waits_forever", lambda ranks: True), patch.object(failures, "FailureWatch", watch):
        yield aborted


def told(name: str) -> None:
    """Tell all ranks that something has happened."""
    dist.distributed_c10d._get_default_store().set(name, "yes")


def wait_until(name: str) -> None:
    dist.distributed_c10d._get_default_store().wait([name])


def watches() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "failure watch" in thread.name]


def freed_from_a_wait(in_block: bool) -> str:
    """Let rank 3 raise in groups of two ranks. Its peer waits for it, and the other group computes for a while.

    Args:
        in_block: True if the peer waits in the block, False if after it, as in a backward.
    """
    rank = dist.get_rank()
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2))
    with waits_without_end() as aborted:

        def compute() -> None:
            if rank == 2:
                aborted.wait(SECONDS)
                raise AssertionError("the thread went on after its wait was aborted")
            wait_until("rank 2 is free")
            time.sleep(PATIENCE + 4 * INTERVAL)

        try:
            with cp.shard(BATCH):
                if rank == 3:
                    raise KeyError("the disk is full")
                if in_block:
                    compute()
            if not in_block:
                compute()
        except (KeyError, RuntimeError) as error:
            if rank == 2:
                told("rank 2 is free")
            return str(error)
    return f"aborted: {aborted.is_set()}"


@pytest.mark.parametrize("in_block", [True, False])
def test_the_peer_of_a_failed_rank_raises_its_message_and_other_groups_go_on(on_ranks, in_block):
    assert on_ranks(4, freed_from_a_wait, in_block) == [
        "aborted: False",
        "aborted: False",
        "another rank failed before this one. rank 3: KeyError: 'the disk is full'",
        "'the disk is full'",
    ]


def goes_on(failing: tuple[int, ...]) -> list[bool | int]:
    """Let some ranks catch an error of theirs and go on, to batches that take longer than the patience."""
    cp = context()
    with waits_without_end() as aborted:
        try:
            with cp.shard(BATCH):
                if dist.get_rank() in failing:
                    raise KeyError
        except KeyError:
            pass
        for _ in range(2):
            with cp.shard(BATCH):
                time.sleep(PATIENCE + 4 * INTERVAL)
    return [aborted.is_set(), len(watches())]


@pytest.mark.parametrize("failing", [(1,), (0, 1)])
def test_ranks_that_catch_an_error_and_go_on_end_nothing(on_ranks, failing):
    assert on_ranks(2, goes_on, failing) == [[False, 1]] * 2


def watches_of_two_worlds(folder) -> list[int]:
    """Count the watches of a world, and those left after it was destroyed and another one made."""
    rank, counts = dist.get_rank(), []
    with waits_without_end():
        for number in range(2):
            dist.destroy_process_group()
            for thread in watches():
                thread.join()
            counts.append(len(watches()))
            dist.init_process_group("gloo", f"file://{folder}/store{number}", rank=rank, world_size=2)
            cp = context()
            for _ in range(2):
                with cp.shard(BATCH):
                    counts.append(len(watches()))
    return counts


def test_a_watch_ends_with_its_world(on_ranks, tmp_path):
    assert on_ranks(2, watches_of_two_worlds, tmp_path) == [[0, 1, 1, 0, 1, 1]] * 2


def watches_over_gloo() -> list[int]:
    """Count watches, and the groups for whose messages they look: none where a wait ends by itself."""
    earlier = watches()  # those of an earlier test may still end
    cp = context()
    for _ in range(2):
        with cp.shard(BATCH):
            pass
    watch = failures.FailureReport.of_process().watch
    return [len(set(watches()) - set(earlier)), len(watch.keys)]


def test_a_watch_over_gloo_ends_no_wait(on_ranks):
    assert on_ranks(2, watches_over_gloo) == [[1, 0]] * 2
