"""Failure reports: a failing rank tells the ranks that wait for it why it failed."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from .failure_watch import FailureWatch, PeerFailure
from .mesh import Ranks, has_nccl
from .notes import BEAT

logger = logging.getLogger(__name__)

SEARCH = BEAT + 1.0
"""Seconds in which the process of a rank that was killed is gone, and those that live have written a note."""


@dataclass
class _Process:
    """Knowledge of this process about failures in one world.

    Args:
        blocks: number of blocks that were opened.
        published: messages of this rank that other ranks of its groups may read, by their keys in the store.
        watch: the thread that writes what this rank does, and watches over failures of other ranks. None where
            the world is one rank.
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

    A rank that left no message was killed, stopped, or ended early. `explain` finds it by the notes of all ranks.

    Args:
        ranks: the ranks that wait for each other in the block.
        what: the block, for the notes.
    """

    _processes: ClassVar[WeakKeyDictionary[object, _Process]] = WeakKeyDictionary()
    """Knowledge about failures in each default process group."""

    def __init__(self, ranks: Ranks, what: str) -> None:
        self._process = self.of_process()
        self.block = self._process.blocks = self._process.blocks + 1
        self._what, self._group_key = what, None
        if self._process.watch is not None:
            self._process.watch.thread, self._process.watch.paused = threading.get_ident(), False
            self._process.watch.notebook.enter(what)
        if ranks.size > 1:
            members = dist.get_process_group_ranks(ranks.group)
            self._group_key = f"context_parallel/failed_in_group_{'_'.join(map(str, members))}"
            if self._process.watch is not None and waits_forever(ranks):
                self._process.watch.keys.add(self._group_key)

    @classmethod
    def of_process(cls) -> _Process:
        """Knowledge of this process about the present world. It starts the watch over a world of several ranks."""
        world = dist.group.WORLD if dist.is_initialized() else cls
        process = cls._processes.setdefault(world, _Process())
        if process.watch is None and dist.is_initialized() and dist.get_world_size() > 1:
            process.watch = FailureWatch()
            process.watch.own = process.published
            _explain_at_the_end()
        return process

    def leave(self) -> None:
        """Note that this rank has left the block."""
        if self._process.watch is not None:
            self._process.watch.notebook.leave(self._what)

    def _drop(self) -> None:
        if self._process.watch is not None:
            self._process.watch.notebook.drop(self._what)

    def publish(self, error: BaseException) -> None:
        """Tell the other ranks why this one raised in this block.

        Raises:
            RuntimeError: with the message of another rank, if `error` only says that waiting for a rank failed.
        """
        self._drop()
        if dist.is_initialized() and not _is_of_waiting(error) and not _is_of_waiting(error.__cause__):
            note_error(error)
            store = dist.distributed_c10d._get_default_store()
            message = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
            if self._process.watch is not None:
                self._process.watch.paused = True
            with suppress(RuntimeError):  # a store that is gone must not hide the error
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
            self._drop()
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
        if found := lost_ranks():
            raise RuntimeError(f"this rank waited for another one. {found}") from error

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
def reported_failures(ranks: Ranks, what: str) -> Iterator[None]:
    """Publish an exception of this block to the ranks that wait for each other. All ranks enter the same blocks.

    Args:
        what: the block, for the notes.
    """
    report = FailureReport(ranks, what)
    try:
        yield
    except BaseException as error:
        report.publish(error)
        raise
    report.leave()


@contextmanager
def noted(what: str) -> Iterator[None]:
    """Note a block that all ranks enter, and say of an error of waiting for which rank this one waited.

    An error of this rank is noted too, for the ranks that wait for it.

    Raises:
        RuntimeError: that names the ranks that were killed, stopped or ended, with what they did last.
    """
    process = FailureReport.of_process()
    if process.watch is not None:
        process.watch.thread = threading.get_ident()
        process.watch.notebook.enter(what)
    try:
        yield
    except BaseException as error:
        if _is_of_waiting(error) and (found := lost_ranks()):
            raise RuntimeError(f"this rank waited for another one. {found}") from error
        note_error(error)
        raise
    if process.watch is not None:
        process.watch.notebook.leave(what)


def note_error(error: BaseException) -> None:
    """Tell ranks that wait for this one now or later that it raised an error."""
    watch = _watch()
    if watch is None:
        return
    if _is_of_waiting(error) or _is_of_waiting(error.__cause__):
        watch.notebook.note.gave_up = True
    else:
        watch.notebook.note.raised = f"{type(error).__name__}: {error}"
    with suppress(RuntimeError):  # the store has ended with the process that holds it
        watch.tell(dist.distributed_c10d._get_default_store())


def _watch() -> FailureWatch | None:
    """Return the watch of this process over the present world, if it has one."""
    process = FailureReport._processes.get(dist.group.WORLD) if dist.is_initialized() else None
    watch = process.watch if process is not None else None
    return watch if watch is not None and watch.notebook.note.pid == os.getpid() else None  # None in a fork


def lost_ranks() -> str:
    """Name the ranks that were killed, stopped, raised or ended, with what they did last; empty if none is known.

    A process that is killed closes its connections before it is gone, so this looks for a while.
    """
    watch = _watch()
    if watch is None:
        return ""
    store, deadline = dist.distributed_c10d._get_default_store(), time.monotonic() + SEARCH
    try:
        watch.notebook.note.gave_up = True
        watch.tell(store)
        while not (found := watch.lost(True, store)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found or watch.lost(False, store)
    except RuntimeError:
        return "The store of the world is gone, which the launcher or rank 0 holds"


@cache
def _explain_at_the_end() -> None:
    """Say at the end of a process by an error, outside of our blocks too, for which rank it waited."""
    before = sys.excepthook

    def explain(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        found = ""
        if _is_of_waiting(error):
            found = lost_ranks()
        else:
            note_error(error)
        before(kind, error, traceback)
        if found:
            logger.error("this rank waited for another one. %s", found)

    sys.excepthook = explain


def _is_of_waiting(error: BaseException | None) -> bool:
    """Return True for the error of a failed message or collective. Gloo raises RuntimeErrors that name its files."""
    if isinstance(error, (dist.DistError, PeerFailure)):
        return True
    return isinstance(error, RuntimeError) and "gloo/" in str(error)


def waits_forever(ranks: Ranks) -> bool:
    """Return True if a wait for a rank that has failed does not end by itself."""
    return has_nccl(ranks.group)
