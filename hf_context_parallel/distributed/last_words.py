"""Last words of a process: one rank says why all of them end, and launchers are told the cause."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from .agreement import agreement_of, is_refusal

CAUSE = "HF_CONTEXT_PARALLEL_CAUSE"
"""Environment variable with the path of a file for the cause of an error, which `hf-context-parallel` prints last."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torchelastic with the path of a file for the cause of an error, which its report shows."""
GRACE = 1.0
"""Seconds for which the other ranks let the one rank print, before the launcher stops it."""
PATIENCE = 10.0
"""Seconds after which a rank prints a refusal that rank 0 should have printed."""

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def tell_launchers(text: str) -> None:
    """Write the cause of an error to the files of the launchers. The first rank that writes is the one that counts."""
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
    with suppress(OSError):  # an error is not replaced by another one
        if ERROR_FILE in os.environ:
            with open(os.environ[ERROR_FILE], "w", encoding="utf-8") as file:
                json.dump({"message": message}, file)
        if CAUSE in os.environ:
            with open(os.environ[CAUSE], "x", encoding="utf-8") as file:
                file.write(text)


def print_agreed_errors_once() -> None:
    """Let one rank print an error that all ranks raise alike, at the end of the process, and the others a line.

    Other errors go to the hook of Python that was there.
    """
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook)


class _Hook:
    """Hook of Python for errors that end the process.

    Args:
        hook: the hook for all other errors.
    """

    def __init__(self, hook: Hook):
        self._hook = hook

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        agreement = agreement_of(error)
        if agreement is None:
            self._hook(kind, error, trace)
            return
        if not agreement.tells:
            print(f"{_rank()} ends by the same error, which another rank prints.", file=sys.stderr, flush=True)
            time.sleep(GRACE)
        tell_launchers(f"{kind.__name__}: {error}")
        if agreement.tells:
            self._hook(kind, error, trace)


@contextmanager
def told() -> Iterator[None]:
    """End the process of a command with status 1 if the block raises.

    A refusal is printed by one rank, without a traceback, or by the launcher where that is ours. Other errors are
    printed with their traceback, and the cause is told to the launcher.
    """
    try:
        yield
    except Exception as error:
        agreement, refused = agreement_of(error), is_refusal(error)
        if agreement is not None and not agreement.tells:
            time.sleep(GRACE)
        tell_launchers(str(error) if refused or agreement else f"{_rank()}: {type(error).__name__}: {error}")
        if agreement is None or agreement.tells:
            if not refused:
                traceback.print_exc()
            elif CAUSE not in os.environ:
                # Usually all ranks fail alike, and the launcher stops all when one exits. Rank 0 gets time to print.
                if agreement is None and os.environ.get("RANK", "0") != "0":
                    time.sleep(PATIENCE)
                sys.exit(str(error))
        sys.exit(1)


def _rank() -> str:
    return f"rank {os.environ.get('RANK', '0')}"
