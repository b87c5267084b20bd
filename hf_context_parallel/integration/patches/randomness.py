"""Random numbers of a rank's own while it computes its shard.

Ranks are seeded alike, as Trainer does it, so that what is to be the same on all of them is. Dropout is not: the same
entries of different tokens would be dropped. So each rank draws from a stream of its own for as long as a batch is
open, seeded from the one that they share, which goes on afterwards as if one number had been drawn from it. Ranks of a
tensor-parallel group have the same tokens and draw alike, unless sequence parallelism divides those too.
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
from ...distributed.mesh import Ranks


@contextmanager
def own_stream(group: CPGroup) -> Iterator[None]:
    """Draw from a stream of this rank's, on the CPU and on the current GPU. It needs none where it always has all
    tokens; where it has them for now, the ranks that it shares a stream with later may draw more or less meanwhile."""
    tensor_rank = group.groups.tensor.rank if group.config.sequence_parallel else 0
    if group.size == group.first_size == 1 and not group.config.sequence_parallel:
        yield
        return
    shared = int(torch.empty((), dtype=torch.int64).random_())
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed_of(shared, group.rank, tensor_rank))
        yield


def share_streams(ranks: Ranks) -> None:
    """Let all ranks go on with the random numbers of the first: Python's, NumPy's and torch's, on the CPU and the GPU.
    Every rank must call this."""
    cuda = torch.cuda.is_available()
    states = [
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if cuda else None,
    ]
    dist.broadcast_object_list(states, group=ranks.group, group_src=0, device=ranks.device)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if cuda:
        torch.cuda.set_rng_state(states[3])
