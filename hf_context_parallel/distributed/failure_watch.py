"""Failure watch: a thread that tells others what this rank does, and frees it from its wait for a rank that failed.

Over NCCL a rank waits in kernels on its device, which do not end when the rank that they wait for has failed. Then the
watchdog of PyTorch ends the process after ten minutes, without the reason. The watch finds the reason in the store of
the world, raises it in the thread that waits, and aborts the communicators, without which that thread would not go on.
Over gloo a wait ends by itself. There the watch only writes the notes of this rank, and says for whom it waits.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar

import torch.distributed as dist

from .notes import BEAT, Notebook, lost, read_notes

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two looks at the store."""
PATIENCE = 5.0
"""Seconds that a rank has to go on after its error, which its caller may have caught."""


LONG_WAIT = 60.0
"""Seconds after which a rank says for which other rank it waits."""
STORE_TIMEOUT = timedelta(seconds=10)
"""Time that a call of the store may take, whose process may be stopped."""


class PeerFailure(RuntimeError):
    """Error of a rank whose peer failed. Python makes it without arguments in the thread that waits."""

    reason: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__(self.reason)


def abort() -> None:
    """Abort all communicators of this process, so that its kernels and its host wait for nobody."""
    dist.distributed_c10d._abort_process_group()


class FailureWatch:
    """Thread that writes notes, and looks for messages of failed ranks, until the process group is gone.

    It has its own connection to the store, so it holds up no other thread, and ends with the process.

    Args:
        abort: ends the waits of this process.
        interval: seconds between two looks at the store.
        patience: seconds for which a message must stay in the store.
        long_wait: seconds after which this rank says for which other it waits.

    Attributes that other threads set:
        keys: keys of the store for messages of the groups of this rank.
        own: the messages of this rank, by their keys.
        thread: the thread that waits for other ranks.
        paused: True while this rank handles an error of its own, and so waits for nobody.
    """

    def __init__(
        self,
        abort: Callable[[], None] = abort,
        interval: float = INTERVAL,
        patience: float = PATIENCE,
        long_wait: float | None = None,
    ):
        self.keys: set[str] = set()
        self.own: dict[str, str] = {}
        self.thread = threading.get_ident()
        self.paused = False
        self.notebook = Notebook(dist.get_rank())
        self._abort, self._interval, self._patience = abort, interval, patience
        self._long_wait = LONG_WAIT if long_wait is None else long_wait
        self._others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
        self._written, self._said, self._looked = -math.inf, -1, -math.inf
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store.set_timeout(STORE_TIMEOUT)
        self._world = weakref.ref(dist.group.WORLD)
        self._seen: dict[str, tuple[str, float]] = {}
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._run, name="hf_context_parallel failure watch", daemon=True)
        self.tell(self._store)
        self._watching.start()
        atexit.register(self.end)  # a thread in the middle of a call would crash the end of Python

    def end(self) -> None:
        """Tell the others that this process ends."""
        if os.getpid() == self.notebook.note.pid:  # no fork
            self._ended.set()
            self._watching.join(timeout=2 * self._interval)

    def _run(self) -> None:
        try:
            while not self._ended.wait(self._interval) and self._is_of_now():
                if time.monotonic() - self._written >= min(BEAT, self._long_wait / 4):
                    self.tell(self._store)
                    self._say_for_whom()
                    self._written = time.monotonic()
                reason = self._found()
                if reason is not None:
                    self._free(reason)
                    break
            self.notebook.note.ended = True
            self.tell(self._store)
        except RuntimeError:  # the store has ended with the process that holds it
            pass
        atexit.unregister(self.end)

    def tell(self, store: Any) -> None:
        """Write to the store what this rank does now."""
        self.notebook.now(self.thread)
        self.notebook.write(store)

    def lost(self, certain: bool, store: Any) -> str:
        """Name the ranks for which this one waits; see `notes.lost`."""
        return lost(read_notes(store, self._others), self.notebook.note, certain)

    def _say_for_whom(self) -> None:
        """Say once in a long wait for which rank this one waits."""
        note = self.notebook.note
        waited = time.time() - note.since
        looked = time.monotonic() - self._looked
        if waited < self._long_wait or note.count == self._said or looked < self._long_wait / 4:
            return
        self._looked = time.monotonic()
        found = self.lost(False, self._store)
        if found:
            self._said = note.count
            logger.warning("rank %d has waited for %.0f s %s: %s", note.rank, waited, note.doing, found)

    def _is_of_now(self) -> bool:
        """Return False if the world was destroyed."""
        world = self._world()
        return world is not None and world is dist.group.WORLD

    def _found(self) -> str | None:
        """Return the message of another rank that has stayed in the store for long enough, if there is one."""
        for key in list(self.keys):
            message = self._store.get(key).decode() if self._store.check([key]) else ""
            if message in ("", self.own.get(key)):
                self._seen.pop(key, None)
                continue
            known, since = self._seen.setdefault(key, (message, time.monotonic()))
            if known != message:
                self._seen[key] = message, time.monotonic()
            elif time.monotonic() - since >= self._patience and not self.paused:
                return message
        return None

    def _free(self, reason: str) -> None:
        PeerFailure.reason = f"another rank failed before this one. {reason}"
        # The error comes first. A thread that is freed before it would compute with what has not arrived.
        raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(PeerFailure))
        if raised:  # the thread lives
            logger.error("this rank waits for one that failed, so it ends its communicators: %s", reason)
            self._abort()
