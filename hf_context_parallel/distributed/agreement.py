"""Agreement: all ranks of a group go on, or all of them raise the same error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .host import on_host
from .mesh import Ranks

AGREED = "agreement"
"""Attribute of an error that all ranks of a group raise alike. Its class stays that which users see and catch."""
SHOWN = 3
"""Number of differences that an error names."""


class Agreement(NamedTuple):
    """Knowledge of a rank about an error that all ranks of a group raise alike.

    Args:
        tells: True on the one rank that prints it at the end of the process.
        expected: True for a refusal, which needs no traceback.
    """

    tells: bool
    expected: bool


def agreed_error(message: str, ranks: Ranks) -> ValueError:
    """Return a refusal that all ranks of a group raise alike, and its first rank prints."""
    return _agreed(message, Agreement(ranks.rank == 0, True))


def _agreed(message: str, agreement: Agreement) -> ValueError:
    error = ValueError(message)
    vars(error)[AGREED] = agreement
    return error


def agreement_of(error: BaseException) -> Agreement | None:
    """Return what this rank knows of an error that all ranks of a group raise alike; None for other errors."""
    return vars(error).get(AGREED)


def is_agreed(error: BaseException) -> bool:
    """Return whether all ranks of a group raise an error alike."""
    return agreement_of(error) is not None


def is_refusal(error: BaseException) -> bool:
    """Return whether an error is a ValueError that this package has raised, whose message says all."""
    agreement = agreement_of(error)
    if agreement is not None:
        return agreement.expected
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = __name__.partition(".")[0]
    ours = trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == package
    return ours and isinstance(error, ValueError)


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
        shown: what the error names if fingerprints differ, see `first_differences`; set by `compare` too.
        remedies: what to do about some of these, in place of `remedy`.

    After the block, `numbers` holds the `number` of each rank, and `alarm` is True if it was on any rank.

    Raises:
        ValueError: on every rank with the same message, if a rank raised in the block or the fingerprints differ.
    """

    def __init__(self, ranks: Ranks, what: str = "", remedy: str = ""):
        self._ranks, self._what, self._remedy = ranks, what, remedy
        self.fingerprint = self.number = 0
        self.alarm = False
        self.numbers: list[int] = []
        self.shown: Mapping[str, object] = {}
        self.remedies: Mapping[str, str] = {}

    def compare(self, content: Mapping[str, object]) -> None:
        """Compare contents between ranks, and name those that differ."""
        self.fingerprint, self.shown = fingerprint(content), content

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
        if odd_rank(fingerprints) is not None:
            names, differences = first_differences(self.shown, self._ranks)
            others = ", ".join(str(rank) for rank, value in enumerate(fingerprints) if value != fingerprints[0])
            text = f"ranks 0 and {others} of the group have different {self._what}"
            remedy = self.remedies.get(names[0], self._remedy) if names else self._remedy
            raise agreed_error(f"{text}{': ' if names else ''}{'; '.join(differences)}. {remedy}", self._ranks)


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


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """Gather a picklable value of each rank. All ranks must call this."""
    values = [value] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(values, value, group=ranks.group)
    return values


def raise_together(ranks: Ranks, failed: Sequence[int], error: Exception | None) -> None:
    """Raise the error of the first rank that failed, on every rank. Every rank must call this.

    An error that a smaller group has agreed on keeps its text. The traceback of an error is kept on its rank.

    Args:
        failed: a flag for each rank that is not 0 if the rank failed. It is the same list on all ranks.
        error: the error of this rank, if there is one.

    Raises:
        ValueError: with the message of that error.
    """
    if not any(failed):
        return
    first = next(rank for rank, flag in enumerate(failed) if flag)
    message = ""
    if error is not None and is_agreed(error):
        message = str(error)
    elif error is not None:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        message = f"rank {first} of the group: {kind}{error}"
    told = [message]
    dist.broadcast_object_list(told, group=ranks.group, group_src=first, device=ranks.device)
    if error is None or (first != ranks.rank and message != told[0]):
        raise _agreed(told[0], Agreement(False, True)) from None
    if is_agreed(error):
        raise error
    agreed = _agreed(told[0], Agreement(ranks.rank == first, is_refusal(error)))
    raise agreed.with_traceback(error.__traceback__) from error.__cause__


def first_differences(content: Mapping[str, object], ranks: Ranks) -> tuple[list[str], list[str]]:
    """Name contents that differ between ranks, and say how. Every rank must call this.

    Args:
        content: tensors, and other values with a short `repr`.

    Returns:
        Names of up to `SHOWN` contents that differ from those of rank 0, and words for each.
    """
    described = {name: _described(value) for name, value in content.items()}
    of_ranks = gather_objects(described, ranks)
    names = dict.fromkeys(name for each in of_ranks for name in each)
    differing = [name for name in names if any(each.get(name) != of_ranks[0].get(name) for each in of_ranks)][:SHOWN]
    return differing, [_difference(name, content.get(name), of_ranks, ranks) for name in differing]


def _described(value: object) -> tuple[str, str, int]:
    """Return dtype and shape of a tensor with a hash of its values; of other values the `repr`."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), str(tuple(value.shape)), fingerprint({"": value})
    return "", repr(value), 0


def _difference(name: str, value: object, of_ranks: Sequence[Mapping[str, Any]], ranks: Ranks) -> str:
    """Say how a content differs on the first rank where it is not that of rank 0. Every rank must call this."""
    odd = next(rank for rank, each in enumerate(of_ranks) if each.get(name) != of_ranks[0].get(name))
    first, other = of_ranks[0].get(name), of_ranks[odd].get(name)
    if first is None or other is None:
        return f"{name} is given on rank {odd if first is None else 0} and not on rank {0 if first is None else odd}"
    if first[0] != other[0]:
        return f"{name} is {first[0] or 'no tensor'} on rank 0 and {other[0] or 'no tensor'} on rank {odd}"
    if first[1] != other[1]:
        return f"{name} is {'of shape ' * bool(first[0])}{first[1]} on rank 0 and {other[1]} on rank {odd}"
    mine = on_host(value).flatten() if isinstance(value, torch.Tensor) else None
    theirs = of_first_rank(mine, ranks)
    found = None
    if ranks.rank == odd and mine is not None:
        apart = ((mine != theirs) & ~((mine != mine) & (theirs != theirs))).nonzero().flatten()
        if len(apart):
            place = apart[0]
            index = [int(i) for i in torch.unravel_index(place, value.shape)]  # type: ignore[attr-defined]
            found = f"{name}{index} is {theirs[place].item()} on rank 0 and {mine[place].item()} on rank {odd}"
            found += f" ({len(apart)} of {len(mine)} elements differ)" if len(mine) > 1 else ""
    words: str | None = gather_objects(found, ranks)[odd]
    return words or f"{name} has other bits on rank 0 and rank {odd}"


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
