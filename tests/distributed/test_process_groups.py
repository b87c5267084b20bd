"""Process groups of processes that fork."""

from __future__ import annotations

import gc
import os
import time

import torch.distributed as dist

from tests.helpers.models import context


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
