"""Leases: process groups live until they are closed, or until no rank uses them any more.

PyTorch keeps a process group, with its threads and connections, until it is destroyed by name. Destroying one is a
matter of this rank alone with gloo. With NCCL all ranks of the group must do it, and in the same order. Python drops
an object at a moment of its own on each rank, at times in the middle of another call. So dropped groups are destroyed
when the next ones are made, which all ranks do together, and only those that all ranks have dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, finalize

import torch.distributed as dist

from .agreement import fingerprint, gather_numbers
from .mesh import Ranks, world

MOST = 62
"""Leases that are compared at a time: the bits of a number."""


@dataclass
class _Leases:
    """Groups of one world that were made and not destroyed, by the number of their lease, and the dropped leases.

    All ranks make and close groups alike, so numbers and their order are the same on all ranks.
    """

    made: int = 0
    living: dict[int, list[dist.ProcessGroup]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)


class Lease:
    """Use of process groups that were made together. All that send messages through them hold it.

    Args:
        groups: the groups of this rank, in the same order on all ranks. None stands for a group of one rank.
    """

    _of_worlds: ClassVar[WeakKeyDictionary[Any, _Leases]] = WeakKeyDictionary()

    def __init__(self, groups: Sequence[dist.ProcessGroup | None]) -> None:
        leases = self._leases()
        self._number = leases.made = leases.made + 1
        leases.living[self._number] = [group for group in groups if group is not None]
        self._world = dist.group.WORLD
        finalize(self, leases.dropped.add, self._number).atexit = False

    @classmethod
    def _leases(cls) -> _Leases:
        return cls._of_worlds.setdefault(dist.group.WORLD, _Leases())

    def end(self) -> None:
        """Destroy the groups, unless their world was destroyed and they with it. Every rank calls this."""
        if self._world is dist.group.WORLD:
            _destroy(self._leases().living.pop(self._number, []))
        self._world = None

    @classmethod
    def end_dropped(cls) -> None:
        """Destroy the groups that all ranks have dropped. Every process of the world must call this."""
        leases, everyone = cls._leases(), world()
        oldest = list(leases.living)[:MOST]
        flags = sum(1 << place for place, number in enumerate(oldest) if number in leases.dropped)
        flags_of_all, compared = gather_numbers(everyone, flags, fingerprint({"leases": oldest}))
        if len(set(compared)) > 1:  # a rank has closed what others use
            return
        for place, number in enumerate(oldest):
            if all(flags >> place & 1 for flags in flags_of_all):
                leases.dropped.discard(number)
                _destroy(leases.living.pop(number))


def _destroy(groups: Sequence[dist.ProcessGroup]) -> None:
    for group in groups:
        dist.destroy_process_group(group)


def close(ranks: Ranks) -> None:
    """End the lease of these ranks. Whoever has them still gets an error when it uses their group."""
    if isinstance(ranks.lease, Lease):
        ranks.lease.end()
    if ranks.group is not None:
        object.__setattr__(ranks, "group", ClosedGroup())


class ClosedGroup:
    """Stands for a process group that was destroyed, and raises when it is used."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(CLOSED)

    def __repr__(self) -> str:
        return "of a closed ContextParallel"


CLOSED = "this ContextParallel is closed: its process groups are gone. Make another one, on every process."
