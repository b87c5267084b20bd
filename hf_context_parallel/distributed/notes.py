"""Notes: what each rank of the world did last, which other ranks read to say for whom they wait.

A rank notes in a variable what it enters and leaves, and its failure watch writes that to the store of the world
every few seconds. All ranks note the same things in the same order, so the rank with the fewest notes is behind.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import psutil

BEAT = 3.0
"""Seconds between two notes of a rank in the store."""
SILENCE = 30.0
"""Seconds without a note after which a rank of another machine counts as lost. Clocks may differ by less."""
MOST_NAMED = 3
"""Ranks that a message names."""


@dataclass
class Note:
    """Last act of a rank.

    Args:
        rank: the rank in the world.
        machine: name of its machine and of its space of process ids, within which `pid` is unique.
        pid: its process.
        started: the time at which the process started, since another one may get its number.
        log: where its output goes.
        count: number of things that it has entered and left.
        doing: what it was in or after.
        since: the time at which it began that.
        where: file, line and function of its thread.
        waits: whether that thread was in a message or a collective.
        written: the time of this note.
        raised: the error that ended its run.
        gave_up: whether it ended because it had waited for another rank in vain.
        ended: whether its process or its process group ended.
    """

    rank: int
    machine: str
    pid: int
    started: float
    log: str
    count: int = 0
    doing: str = "before its first step"
    since: float = 0.0
    where: str = ""
    waits: bool = False
    written: float = 0.0
    raised: str = ""
    gave_up: bool = False
    ended: bool = False

    def words(self, state: str) -> str:
        """Describe the rank, whose state is that of `lost`."""
        ago = max(0.0, time.time() - self.since)
        place = f", at {self.where}" if self.where and not self.raised and not self.ended else ""
        return (
            f"rank {self.rank} {state}. Its last note is of {ago:.0f} s ago: {self.doing}{place} "
            f"(process {self.pid} on {self.machine.split(' ')[0]}, log: {self.log})"
        )


class Notebook:
    """Record of what this rank does. Its own thread writes it, and the failure watch reads it."""

    def __init__(self, rank: int) -> None:
        self.note = Note(rank, _machine(), os.getpid(), psutil.Process().create_time(), _log(), since=time.time())
        self._inside: list[str] = []

    def enter(self, what: str) -> None:
        self._inside.append(what)
        self._turn("")

    def leave(self, what: str) -> None:
        """Note that this rank has left something, and all that it entered in there."""
        self.drop(what)
        self._turn(what)

    def drop(self, what: str) -> None:
        """Leave something by an error. The note stays as it is, for the others."""
        if what in self._inside:
            del self._inside[len(self._inside) - 1 - self._inside[::-1].index(what) :]

    def _turn(self, left: str) -> None:
        parts = [f"in {what}" for what in self._inside] + ([f"after {left}"] if left else [])
        note = self.note
        note.count, note.doing, note.since = note.count + 1, ", ".join(parts), time.time()
        note.raised, note.gave_up = "", False

    def now(self, thread: int) -> Note:
        """Complete the note by where a thread of this process is."""
        self.note.where, self.note.waits = _place(thread)
        self.note.written = time.time()
        return self.note

    def write(self, store: Any) -> None:
        store.set(_key(self.note.rank), json.dumps(asdict(self.note)))


def read_notes(store: Any, ranks: Sequence[int]) -> list[Note]:
    """Read the notes of ranks. Those that have written none are left out."""
    keys = list(map(_key, ranks))
    if not store.check(keys):
        keys = [key for key in keys if store.check([key])]
    return [Note(**json.loads(note)) for note in store.multi_get(keys)] if keys else []


def lost(notes: Sequence[Note], mine: Note, certain: bool) -> str:
    """Name the ranks for which this one waits, with what they did last. It is empty if they are not known.

    Args:
        notes: the notes of the other ranks.
        mine: the note of this rank.
        certain: True to name only ranks that raised, ended or were stopped, and not those that are behind.
    """
    groups: dict[int, list[str]] = {}
    # What ranks did that gave up is a consequence.
    for note in [note for note in notes if not note.gave_up] or notes:
        order, state = _state(note, mine)
        if order <= (4 if certain else 6):
            groups.setdefault(order, []).append(note.words(state))
    if not groups:
        return ""
    named = groups[min(groups)]
    more = f"; and {len(named) - MOST_NAMED} more ranks" if len(named) > MOST_NAMED else ""
    return "; ".join(named[:MOST_NAMED]) + more


def _state(note: Note, mine: Note) -> tuple[int, str]:
    """Return how sure it is that others wait for a rank, 0 the surest, and the words for its state."""
    if note.raised:
        return 0, f"raised {note.raised}"
    if note.ended:
        return 1, "has ended, and left the process group"
    if note.machine == mine.machine:
        status = _status(note)
        if status in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return 2, "was killed: its process is gone and raised no error"
        if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return 3, "is stopped by a signal or a debugger"
    elif (silent := time.time() - note.written) > SILENCE:
        return 4, f"has not been heard of for {silent:.0f} s"
    if note.count < mine.count:
        return 5, "is behind"
    if note.count == mine.count and mine.waits and not note.waits:
        return 6, "is at the same place, and waits for no other rank"
    return 7, ""


def _status(note: Note) -> str | None:
    """Return the state of the process of a note on this machine; None if it is gone."""
    try:
        process = psutil.Process(note.pid)
        return str(process.status()) if process.create_time() == note.started else None
    except psutil.Error:
        return None


def _place(thread: int) -> tuple[str, bool]:
    """Return where a thread is, in code of the user if it is called by such code, and whether it waits for ranks."""
    frames = _frames(thread)
    waits = any(f"torch{os.sep}distributed{os.sep}" in file or file.endswith(_OF_MESSAGES) for file, _, _ in frames)
    found = next((frame for frame in frames if not frame[0].startswith(_installed())), frames[0] if frames else None)
    return (f"{found[0]}:{found[1]} in {found[2]}" if found else ""), waits


def _frames(thread: int) -> list[tuple[str, str, str]]:
    """List file, line and function of the innermost 100 frames of a thread, the innermost first.

    No garbage is collected meanwhile. Making a frame may begin that, finalizers may then give the thread a turn, and
    Python 3.11 would write to frames that are gone. `faulthandler` makes none, but does not take the lock that is held
    while threads begin, and ends the process if it meets one that has just begun.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        frame = sys._current_frames().get(thread)
        found: list[tuple[str, str, str]] = []
        while frame is not None and len(found) < 100:
            found.append((frame.f_code.co_filename, str(frame.f_lineno), frame.f_code.co_name))
            frame = frame.f_back
        return found
    finally:
        if collects:
            gc.enable()


_OF_MESSAGES = (f"distributed{os.sep}shared_memory.py", f"distributed{os.sep}messages.py")


@cache
def _installed() -> tuple[str, ...]:
    """Return beginnings of the paths of files that are not the user's: packages, Python itself, and this package."""
    paths = sysconfig.get_paths()
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return (*{paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}, package, "<")


@cache
def _machine() -> str:
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        space = ""
    return f"{socket.gethostname()} {space}"


def _log() -> str:
    """Return the file that the output for errors goes to, as of a launcher with `--redirects`, or `its own output`."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:  # no Linux, or closed
        path = ""
    return path if os.path.isfile(path) else "its own output"


def _key(rank: int) -> str:
    return f"context_parallel/note_of_rank_{rank}"
