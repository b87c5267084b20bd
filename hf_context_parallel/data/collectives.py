"""Collectives of accelerate that take a CP group for one process: each group adds one entry, from its first rank.

Ranks of a group hold the same samples. A trainer that gathers a metric of its samples would count each sample once for
each rank, and one that gathers and slices by `process_index` would get the samples of another group.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import operations, recursively_apply

from ..compat import lookup

_first_ranks: ContextVar[Sequence[int] | None] = ContextVar("first ranks of the CP groups", default=None)


@contextmanager
def from_first_ranks(first_ranks: Sequence[int]) -> Iterator[None]:
    """Let `gather` and `gather_object` of accelerate return the entries of these ranks alone in this block.

    They may be called as methods of an Accelerator or as the functions of `accelerate.utils`.
    """
    _install()
    token = _first_ranks.set(first_ranks)
    try:
        yield
    finally:
        _first_ranks.reset(token)


@functools.cache
def _install() -> None:
    """Put the functions below in place of those that accelerate's `gather` and `gather_object` call."""
    gather, gather_object = (
        lookup(operations.__name__, name, "gathering by CP groups") for name in ("_gpu_gather", "_gpu_gather_object")
    )

    @functools.wraps(gather)
    def gather_of_groups(tensor: Any) -> Any:
        gathered, ranks = gather(tensor), _first_ranks.get()
        return gathered if ranks is None else recursively_apply(functools.partial(_entries, ranks), gathered)

    @functools.wraps(gather_object)
    def gather_object_of_groups(object: Any) -> Any:
        ranks = _first_ranks.get()
        if ranks is None:
            return gather_object(object)
        every = gather_object([object])  # a list with one entry for each rank
        return [x for rank in ranks for x in every[rank]]

    operations._gpu_gather, operations._gpu_gather_object = gather_of_groups, gather_object_of_groups


def _entries(ranks: Sequence[int], gathered: torch.Tensor) -> torch.Tensor:
    return gathered.unflatten(0, (PartialState().num_processes, -1))[list(ranks)].flatten(0, 1)
