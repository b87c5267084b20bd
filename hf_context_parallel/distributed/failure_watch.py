"""Failure watch: a thread that frees this process from its wait for a rank that failed.

Over NCCL a rank waits in kernels on its device, which do not end when the rank that they wait for has failed. Then the
watchdog of PyTorch ends the process after ten minutes, without the reason. The watch finds the reason in the store of
the world, raises it in the thread that waits, and aborts the communicators, without which that thread would not go on.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import ClassVar

import torch.distributed as dist

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two looks at the store."""
PATIENCE = 5.0
"""Seconds that a rank has to go on after its error, which its caller may have caught."""


class PeerFailure(RuntimeError):
    """Error of a rank whose peer failed. Python makes it without arguments in the thread that waits."""

    reason: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__(self.reason)


def abort() -> None:
    """Abort all communicators of this process, so that its kernels and its host wait for nobody."""
    dist.distributed_c10d._abort_process_group()


class FailureWatch:
    """Thread that looks for messages of failed ranks until one is found or the process group is gone.

    It has its own connection to the store, so it holds up no other thread, and ends with the process.

    Args:
        abort: ends the waits of this process.
        interval: seconds between two looks at the store.
        patience: seconds for which a message must stay in the store.

    Attributes that other threads set:
        keys: keys of the store for messages of the groups of this rank.
        own: the messages of this rank, by their keys.
        thread: the thread that waits for other ranks.
        paused: True while this rank handles an error of its own, and so waits for nobody.
    """

    def __init__(self, abort: Callable[[], None] = abort, interval: float = INTERVAL, patience: float = PATIENCE):
        self.keys: set[str] = set()
        self.own: dict[str, str] = {}
        self.thread = threading.get_ident()
        self.paused = False
        self._abort, self._interval, self._patience = abort, interval, patience
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._world = weakref.ref(dist.group.WORLD)
        self._seen: dict[str, tuple[str, float]] = {}
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._run, name="hf_context_parallel failure watch", daemon=True)
        self._watching.start()
        atexit.register(self.end)  # a thread in the middle of a call would crash the end of Python

    def end(self) -> None:
        self._ended.set()
        self._watching.join(timeout=2 * self._interval)

    def _run(self) -> None:
        while not self._ended.wait(self._interval) and self._is_of_now():
            try:
                reason = self._found()
            except RuntimeError:  # the store has ended with the process that holds it
                break
            if reason is not None:
                self._free(reason)
                break
        atexit.unregister(self.end)

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
