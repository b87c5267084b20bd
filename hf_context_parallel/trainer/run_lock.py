"""Lock of a folder into which a run writes, so that no second run writes into it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ..distributed.agreement import collective
from ..distributed.mesh import Ranks

try:
    import fcntl
except ImportError:  # Windows has no record locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME = "_run.lock"
"""File in the folder. The Trainer pushes no file to the hub whose name begins with `_`."""
_held: set[Path] = set()
"""Locks of this process. It would lose one that it opens and closes once more."""


@contextmanager
def only_run_in(folder: str | Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a folder in a block. The first rank holds it. All ranks enter the block.

    It is a record lock of the system: it ends with its process, and processes that this one forks do not have it.

    Raises:
        ValueError: on every rank, if another process holds the lock or the folder cannot be written.
    """
    path, lock = Path(folder).resolve() / NAME, None
    with collective(ranks):
        if ranks.rank == 0 and path not in _held:
            lock = _take(path)
    if lock is None:
        yield
        return
    _held.add(path)
    try:
        yield
    finally:
        _held.remove(path)
        lock.close()


def _take(path: Path) -> TextIO | None:
    """Take a lock, and write host and process into its file.

    Returns:
        The open file, which holds the lock, or None if the system has no locks here.

    Raises:
        ValueError: if another process holds the lock or the folder cannot be written.
    """
    if fcntl is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"output_dir={str(path.parent)!r} cannot be written ({error}). Set another one, or save_strategy='no'."
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or "a process that has just started"
        file.close()
        raise ValueError(
            f"output_dir={str(path.parent)!r} is that of another run, which still trains: {holder}. Wait until it "
            "ends, end it, or set another output_dir."
        ) from error
    except OSError as error:
        logger.warning("%s has no locks (%s), so a second run into it would not be refused", path.parent, error)
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
