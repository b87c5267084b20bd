"""All ranks of a group go on, or all of them raise the same error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from .mesh import Ranks


def agree(
    ranks: Ranks, error: Exception | None, fingerprint: int, what: str, remedy: str, shared: int = 0
) -> list[int]:
    """Compare notes with the group: one all-reduce of three integers a rank, which every rank enters.

    Args:
        error: what went wrong on this rank, if anything.
        fingerprint: a number that must be the same on all ranks.
        what, remedy: what the fingerprint is of, and what to do where it differs, for the message.
        shared: a number of this rank's, for all to see.

    Returns:
        The ranks' `shared` numbers.

    Raises:
        ValueError: on every rank with the same message, if a rank had an error or the fingerprints differ.
    """
    if ranks.size == 1:
        if error is not None:
            raise error
        return [shared]
    notes = torch.zeros(ranks.size, 3, dtype=torch.int64)
    notes[ranks.rank] = torch.tensor([error is not None, fingerprint, shared])
    notes = notes.to(ranks.device)
    dist.all_reduce(notes, group=ranks.group)
    failed, fingerprints, numbers = notes.T.tolist()
    if any(failed):
        first = failed.index(1)
        message = [str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(message, group=ranks.group, group_src=first, device=ranks.device)
        raise ValueError(f"rank {first} of the group: {message[0]}") from error
    if (odd := odd_rank(fingerprints)) is not None:
        raise ValueError(f"ranks 0 and {odd} of the group have different {what}. {remedy}")
    return numbers


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
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(repr(value).encode())
    return int.from_bytes(digest.digest(), "big") >> 1
