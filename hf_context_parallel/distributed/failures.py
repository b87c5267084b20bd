"""Failure reports: a failing rank tells the ranks that wait for it why it failed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from .failure_watch import FailureWatch, PeerFailure
from .mesh import Ranks, has_nccl


@dataclass
class _Process:
    """Knowledge of this process about failures in one world.

    Args:
        blocks: number of blocks that were opened.
        published: messages of this rank that other ranks of its groups may read, by their keys in the store.
        watch: the thread that watches over failures of other ranks, where a wait does not end by itself.
    """

    blocks: int = 0
    published: dict[str, str] = field(default_factory=dict)
    watch: FailureWatch | None = None


class FailureReport:
    """Error message that a failing rank publishes so that its peers can raise it.

    All ranks open the same blocks (of `cp.shard`, calls of a decoder, steps of the Trainer), so the number of a block
    identifies its message. The message is written to the store of the default process group, which outlives the
    connections between processes.

    Over gloo, a wait for a failed rank ends when that rank ends or after a timeout, and `explain` then raises its
    message. Over NCCL it would not end, so a `FailureWatch` looks for messages of the ranks of the group. A message
    to the group is taken back when its ranks next agree, since then all have gone on.

    Args:
        ranks: the ranks that wait for each other in the block.
    """

    _processes: ClassVar[WeakKeyDictionary[object, _Process]] = WeakKeyDictionary()
    """Knowledge about failures in each default process group."""

    def __init__(self, ranks: Ranks) -> None:
        world = dist.group.WORLD if dist.is_initialized() else type(self)
        self._process = self._processes.setdefault(world, _Process())
        self.block = self._process.blocks = self._process.blocks + 1
        self._group_key = None
        if ranks.size > 1:
            members = dist.get_process_group_ranks(ranks.group)
            self._group_key = f"context_parallel/failed_in_group_{'_'.join(map(str, members))}"
            self._watch(self._group_key, waits_forever(ranks))

    def _watch(self, key: str, waits_forever: bool) -> None:
        """Look for messages to a group from now on, if a wait for a failed rank of it does not end by itself."""
        process = self._process
        if process.watch is None and waits_forever:
            process.watch = FailureWatch()
            process.watch.own = process.published
        if process.watch is not None:
            process.watch.thread, process.watch.paused = threading.get_ident(), False
            if waits_forever:
                process.watch.keys.add(key)

    def publish(self, error: BaseException) -> None:
        """Tell the other ranks why this one raised in this block.

        Raises:
            RuntimeError: with the message of another rank, if `error` only says that waiting for a rank failed.
        """
        if dist.is_initialized() and not _is_of_waiting(error) and not _is_of_waiting(error.__cause__):
            store = dist.distributed_c10d._get_default_store()
            message = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
            if self._process.watch is not None:
                self._process.watch.paused = True
            if self._group_key is not None:
                self._process.published[self._group_key] = message
                store.set(self._group_key, message)
            store.set(self._key(self.block), message)
        self.explain(error, self.block)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Publish a refusal in this block, and explain an error of waiting by the block before.

        Ranks of other groups go on after a refusal, and then wait for this rank. Without an error, all ranks of the
        group have gone on from their errors in earlier blocks.
        """
        try:
            yield
            self._take_back()
        except RuntimeError as failure:
            self.explain(failure, self.block - 1)
            raise
        except ValueError as refusal:
            self.publish(refusal)
            raise

    def explain(self, error: BaseException, block: int) -> None:
        """Raise the message that another rank published in a block, if `error` only says that waiting failed.

        Raises:
            RuntimeError: with the message of the other rank.
        """
        if not dist.is_initialized() or not _is_of_waiting(error):
            return
        store = dist.distributed_c10d._get_default_store()
        key = self._key(block)
        if store.check([key]):
            raise RuntimeError(f"another rank failed before this one. {store.get(key).decode()}") from error

    def _take_back(self) -> None:
        """Take back the messages of this rank to groups, unless another rank has written over them."""
        published = self._process.published
        while published:
            key, message = published.popitem()
            dist.distributed_c10d._get_default_store().compare_set(key, message, "")

    @staticmethod
    def _key(block: int) -> str:
        return f"context_parallel/failed_in_block_{block}"


@contextmanager
def reported_failures(ranks: Ranks) -> Iterator[None]:
    """Publish an exception of this block to the ranks that wait for each other. All ranks enter the same blocks."""
    report = FailureReport(ranks)
    try:
        yield
    except BaseException as error:
        report.publish(error)
        raise


def _is_of_waiting(error: BaseException | None) -> bool:
    """Return True for the error of a failed message or collective. Gloo raises RuntimeErrors that name its files."""
    if isinstance(error, (dist.DistError, PeerFailure)):
        return True
    return isinstance(error, RuntimeError) and "gloo/" in str(error)


def waits_forever(ranks: Ranks) -> bool:
    """Return True if a wait for a rank that has failed does not end by itself."""
    return has_nccl(ranks.group)
