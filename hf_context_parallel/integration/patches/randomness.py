"""Random streams: each rank draws its own random numbers while it computes its shard.

The Trainer seeds all ranks alike, so that weights and samples are the same on all of them. Dropout must differ: with
one stream, ranks would drop the same entries of different tokens. So each rank has its own stream while it computes a
shard. Its seed comes from the shared stream and the rank. If anything was drawn from it, the shared stream goes on as
if one number had been drawn there. Ranks of a tensor-parallel group hold the same tokens and draw alike, unless
sequence parallelism divides these tokens too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from ...attention.scores import seed_of
from ...cp_group import CPGroup
from ...distributed.agreement import of_first_rank
from ...distributed.mesh import Ranks


@contextmanager
def own_stream(group: CPGroup, training: bool = True) -> Iterator[None]:
    """Draw from the stream of this rank in this block, on the CPU and on the current GPU.

    A rank that always holds all tokens keeps the shared stream. A group that `resize` made one rank small does not:
    other ranks may draw more or fewer numbers, and the shared stream must stay the same for the larger group.

    Args:
        training: False for a model in evaluation, which draws nothing.
    """
    tensor_rank = group.groups.tensor.rank if group.config.sequence_parallel else 0
    if not training or (group.size == group.first_size == 1 and not group.config.sequence_parallel):
        yield
        return
    before = torch.get_rng_state()
    shared = int(torch.empty((), dtype=torch.int64).random_())
    after, is_drawn = torch.get_rng_state(), True
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed_of(shared, group.rank, tensor_rank))
            begun = _states()
            yield
            is_drawn = any(not torch.equal(a, b) for a, b in zip(begun, _states()))
    finally:
        torch.set_rng_state(after if is_drawn else before)


def _states() -> list[torch.Tensor]:
    """Return the random states of the CPU and the current GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def share_streams(ranks: Ranks) -> None:
    """Copy the random state of the first rank to all ranks: Python, NumPy and torch, on the CPU and the GPU.

    Every rank must call this.
    """
    _set_all(of_first_rank(_all_states(), ranks))


def take_streams_of_processes(number: int) -> None:
    """Take the random state of the rank with this number. Every rank of the world must call this.

    CP group `number` then draws as that process would draw without CP.
    """
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, _all_states())
    _set_all(every[number])


def _all_states() -> list:
    """Return the random states of Python, NumPy and torch, on the CPU and the current GPU."""
    cuda = torch.cuda.is_available()
    return [
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if cuda else None,
    ]


def _set_all(states: list) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])
