"""Agreement: all ranks of a group go on, or all of them raise the same error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .host import on_host
from .mesh import Ranks

AGREED = "is_agreed_by_all_ranks"
"""Attribute of an error that all ranks of a group raise alike. Its class stays that which users see and catch."""


def agreed_error(message: str) -> ValueError:
    """Return an error that all ranks of a group raise alike."""
    error = ValueError(message)
    vars(error)[AGREED] = True
    return error


def is_agreed(error: BaseException) -> bool:
    """Return whether all ranks of a group raise an error alike."""
    return AGREED in vars(error)


class collective:
    """`with` block after which all ranks of a group go on, or all raise the same error.

    It takes one all-reduce of three integers for each rank. Every rank enters it, whatever it raises in the block.

    Args:
        ranks: the ranks of the group.
        what: name of the things that `fingerprint` is made of, for the error message.
        remedy: what to do if fingerprints differ, for the error message.

    Attributes that the block may set:
        fingerprint: a number that must be the same on all ranks.
        number: a number of this rank, to be told to all ranks.
        alarm: a flag of this rank, to be told to all ranks.

    After the block, `numbers` holds the `number` of each rank, and `alarm` is True if it was on any rank.

    Raises:
        ValueError: on every rank with the same message, if a rank raised in the block or the fingerprints differ.
    """

    def __init__(self, ranks: Ranks, what: str = "", remedy: str = ""):
        self._ranks, self._what, self._remedy = ranks, what, remedy
        self.fingerprint = self.number = 0
        self.alarm = False
        self.numbers: list[int] = []

    def __enter__(self) -> collective:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt is not told to the other ranks
        if self._ranks.size == 1:
            self.numbers = [self.number]
            return
        flags = (error is not None) + 2 * self.alarm
        flags_of_all, fingerprints, self.numbers = gather_numbers(self._ranks, flags, self.fingerprint, self.number)
        self.alarm = any(flags & 2 for flags in flags_of_all)
        raise_together(self._ranks, [flags & 1 for flags in flags_of_all], error)
        check_consensus(fingerprints, self._what, self._remedy)


def gather_numbers(ranks: Ranks, *mine: int) -> list[list[int]]:
    """Gather each number from all ranks. Every rank must call this with the same count of numbers."""
    if ranks.size == 1:
        return [[int(number)] for number in mine]
    notes = torch.zeros(ranks.size, len(mine), dtype=torch.int64)
    notes[ranks.rank] = torch.tensor(mine)
    notes = notes.to(ranks.device)
    dist.all_reduce(notes, group=ranks.group)
    return notes.T.tolist()


def of_first_rank(value: Any, ranks: Ranks) -> Any:
    """Return a picklable value of the first rank. All ranks must call this."""
    if ranks.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=ranks.group, group_src=0, device=ranks.device)
    return values[0]


def raise_together(ranks: Ranks, failed: Sequence[int], error: Exception | None) -> None:
    """Raise the error of the first rank that failed, on every rank. Every rank must call this.

    Args:
        failed: a flag for each rank that is not 0 if the rank failed. It is the same list on all ranks.
        error: the error of this rank, if there is one.

    Raises:
        ValueError: with the message of that error.
    """
    if not any(failed):
        return
    first = next(rank for rank, flag in enumerate(failed) if flag)
    message = [str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(message, group=ranks.group, group_src=first, device=ranks.device)
    raise agreed_error(f"rank {first} of the group: {message[0]}") from error


def check_consensus(fingerprints: Sequence[int], what: str, remedy: str) -> None:
    """Raise unless all ranks have the same fingerprint.

    Raises:
        ValueError: if a fingerprint differs from that of rank 0; the message names the rank.
    """
    if (odd := odd_rank(fingerprints)) is not None:
        raise agreed_error(f"ranks 0 and {odd} of the group have different {what}. {remedy}")


def odd_rank(values: Sequence[int]) -> int | None:
    """First rank whose value differs from that of rank 0, or None if all are the same."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)


def fingerprint(content: Mapping[str, object]) -> int:
    """Hash contents to 63 bits. Tensors count by dtype, shape and values, other values by their repr."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(content):
        value = content[name]
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(on_host(value).contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return int.from_bytes(digest.digest(), "big") >> 1
