"""All ranks of a group go on, or all of them raise the same error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar
from weakref import WeakKeyDictionary

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


class LastWords:
    """What the ranks that wait for one that raised are told of it, once their wait has failed.

    All ranks open the same blocks, so a block's number says which message is of it. Why a rank raised is left in the
    store through which the processes met, which outlives their connections.
    """

    _opened: ClassVar[WeakKeyDictionary[object, int]] = WeakKeyDictionary()
    """How many blocks were opened since the processes of a world met."""

    def __init__(self):
        world = dist.group.WORLD if dist.is_initialized() else type(self)
        self.block = self._opened[world] = self._opened.get(world, 0) + 1

    def leave(self, error: BaseException) -> None:
        """Tell the other ranks why this one raised in this block; or raise what another told, if that is why.

        Raises:
            RuntimeError: with the other's message, if `error` is that waiting for it has failed.
        """
        if dist.is_initialized() and not _is_of_waiting(error):
            store = dist.distributed_c10d._get_default_store()
            store.set(self._key(self.block), f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        self.explain(error, self.block)

    def explain(self, error: BaseException, block: int) -> None:
        """Raise what another rank left in a block, if `error` is that waiting for it has failed.

        Raises:
            RuntimeError: with the other's message.
        """
        if not dist.is_initialized() or not _is_of_waiting(error):
            return
        store = dist.distributed_c10d._get_default_store()
        key = self._key(block)
        if store.check([key]):
            raise RuntimeError(f"another rank failed before this one. {store.get(key).decode()}") from error

    @staticmethod
    def _key(block: int) -> str:
        return f"context_parallel/failed_in_block_{block}"


def _is_of_waiting(error: BaseException) -> bool:
    """Whether an error is of a message or collective that failed: gloo's are RuntimeErrors that name its files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


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
