"""All ranks of a group go on, or all of them raise the same error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from .mesh import Ranks


class collective:
    """`with` block that every rank of a group leaves alike: they all go on, or all raise the same error.

    It takes one all-reduce of three integers a rank, which every rank enters, whatever it raises in the block.

    Args:
        ranks: the group.
        what, remedy: what `fingerprint` is of, and what to do where it differs, for the message.

    Set in the block, where it has something to say:
        fingerprint: a number that must be the same on all ranks.
        number: a number of this rank's, for all to see.

    After the block `numbers` has each rank's `number`.

    Raises:
        ValueError: on every rank with the same message, if a rank raised in the block or the fingerprints differ.
    """

    def __init__(self, ranks: Ranks, what: str = "", remedy: str = ""):
        self._ranks, self._what, self._remedy = ranks, what, remedy
        self.fingerprint = self.number = 0
        self.numbers: list[int] = []

    def __enter__(self) -> collective:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt is not for the others
        if self._ranks.size == 1:
            self.numbers = [self.number]
            return
        notes = gather_numbers(self._ranks, error is not None, self.fingerprint, self.number)
        failed, fingerprints, self.numbers = notes
        raise_together(self._ranks, failed, error)
        check_consensus(fingerprints, self._what, self._remedy)


def gather_numbers(ranks: Ranks, *mine: int) -> list[list[int]]:
    """For each number of this rank, those of all ranks. Every rank must call this, with as many."""
    if ranks.size == 1:
        return [[int(number)] for number in mine]
    notes = torch.zeros(ranks.size, len(mine), dtype=torch.int64)
    notes[ranks.rank] = torch.tensor(mine)
    notes = notes.to(ranks.device)
    dist.all_reduce(notes, group=ranks.group)
    return notes.T.tolist()


def raise_together(ranks: Ranks, failed: Sequence[int], error: Exception | None) -> None:
    """Raise the error of the first rank that failed, on every rank. Every rank must call this.

    Args:
        failed: for each rank, whether it did: the same on all.
        error: that of this rank, if any.

    Raises:
        ValueError: with its message.
    """
    if not any(failed):
        return
    first = next(rank for rank, flag in enumerate(failed) if flag)
    message = [str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(message, group=ranks.group, group_src=first, device=ranks.device)
    raise ValueError(f"rank {first} of the group: {message[0]}") from error


def check_consensus(fingerprints: Sequence[int], what: str, remedy: str) -> None:
    """Raise unless all ranks have the same fingerprint.

    Raises:
        ValueError: naming a rank that differs.
    """
    if (odd := odd_rank(fingerprints)) is not None:
        raise ValueError(f"ranks 0 and {odd} of the group have different {what}. {remedy}")


def odd_rank(values: Sequence[int]) -> int | None:
    """The first rank whose value is not rank 0's; None if all ranks have the same."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), None)


def fingerprint(content: Mapping[str, object]) -> int:
    """63 bits that tell contents apart. Tensors count by dtype, shape and values, other values by their repr."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(content):
        value = content[name]
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode())
    return int.from_bytes(digest.digest(), "big") >> 1
