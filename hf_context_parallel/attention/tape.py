"""Tapes: attention that a checkpointed function computed in its first pass, for the passes that compute it again.

Gradient checkpointing calls a function once in forward, and again in backward. The first call records the output and
the LSE of each attention on a tape. Later calls replay: they take both from the tape, run no kernel and send nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .host_memory import OnHost, check_unchanged, host_memory


class Record:
    """One call of attention on a tape.

    Args:
        asked: what a replay must ask for.
        means: what the first pass computed with. Backward of a later pass uses it too.
        on_host: True to keep the output and its LSE in memory of the host.
    """

    def __init__(self, asked: tuple[Any, ...], means: Any, on_host: bool):
        self.asked, self.means, self._on_host = asked, means, on_host
        self._held: OnHost | tuple[torch.Tensor, ...] = ()
        self._version = 0

    @property
    def is_kept(self) -> bool:
        """True once output and LSE are on the tape."""
        return self._held != ()

    def keep(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Put an output and its LSE on the tape."""
        output = output.detach()  # autograd is going to add a graph to the tensor that was given
        self._version = output._version
        self._held = host_memory(output.device).hold(output, lse) if self._on_host else (output, lse)

    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output and its LSE.

        Raises:
            RuntimeError: if the output was changed in place.
        """
        if isinstance(self._held, OnHost):
            output, lse = self._held.tensors()
        else:
            output, lse = self._held
            check_unchanged(output, self._version)
        return output.detach(), lse

    def fetch(self) -> None:
        """Begin to copy what the host holds to the device."""
        if isinstance(self._held, OnHost):
            self._held.fetch()


class Tape:
    """Records of one checkpointed function, in the order of its calls of attention.

    Args:
        on_host: True to keep the records in memory of the host.
    """

    newest: weakref.ref[Tape] | None = None
    """Tape that was made last, of those on the host."""

    def __init__(self, on_host: bool):
        self.on_host = on_host
        self.records: list[Record] = []
        self._before: weakref.ref[Tape] | None = None
        if on_host:
            self._before, Tape.newest = Tape.newest, weakref.ref(self)

    def fetch(self) -> None:
        """Begin to copy the records to the device, and those of the tape before, which backward needs next."""
        before = None if self._before is None else self._before()
        for tape in (self, before):
            for record in () if tape is None else tape.records:
                record.fetch()


class Pass:
    """One pass over a function with a tape.

    Args:
        position: number of the next record.
        replays: True for a pass that computes again.
    """

    def __init__(self, tape: Tape, position: int, replays: bool):
        self.tape, self.position, self._replays = tape, position, replays

    def next(self, asked: tuple[Any, ...], means: Any) -> Record:
        """Return the record of the next call of attention. In the first pass it is a new one.

        Args:
            asked: numbers and settings of the call, which are the same in all passes.
            means: what the call is computed with.

        Raises:
            RuntimeError: if the first pass recorded no such call.
        """
        records = self.tape.records
        if not self._replays:
            records.append(Record(asked, means, self.tape.on_host))
        elif self.position == len(records) or records[self.position].asked != asked:
            recorded = "no more attention" if self.position == len(records) else str(records[self.position].asked)
            raise RuntimeError(
                f"a layer that gradient checkpointing computes again asks for attention {asked}, where its first pass "
                f"computed {recorded}. Make its code do the same in both passes, or set attention_checkpoints='off'."
            )
        self.position += 1
        return records[self.position - 1]


class _Active(threading.local):
    """Passes that a thread has begun and not ended."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []


_active = _Active()


def active_pass() -> Pass | None:
    """Return the innermost pass that this thread has begun and not ended, or None."""
    return _active.passes[-1] if _active.passes else None


@contextmanager
def _within(one: Pass) -> Iterator[None]:
    _active.passes.append(one)
    try:
        yield
    finally:
        _active.passes.pop()


def with_tape(run: Callable[..., Any], on_host: bool = False) -> Callable[..., Any]:
    """Wrap a function that gradient checkpointing calls several times, so that its attention is computed once.

    A function inside another one with a tape shares that tape. If the inner one alone is called again, it replays from
    where it began.

    Args:
        on_host: True to keep attention in memory of the host.
    """
    begun: tuple[Tape, int] | None = None

    def run_with_tape(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        replays, outer = begun is not None, active_pass()
        if begun is None:
            begun = (Tape(on_host), 0) if outer is None else (outer.tape, outer.position)
            if outer is not None:
                return run(*args, **kwargs)
        tape, start = begun
        if replays:
            tape.fetch()
        with _within(Pass(tape, start, replays)):
            return run(*args, **kwargs)

    return run_with_tape
