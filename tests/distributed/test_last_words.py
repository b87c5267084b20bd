"""Tests of what a process says when an error ends it."""

from __future__ import annotations

import json
import sys

import pytest

from hf_context_parallel.distributed import last_words
from hf_context_parallel.distributed.agreement import AGREED, Agreement
from hf_context_parallel.recipe.errors import RecipeError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of the launchers; pauses are left out."""
    monkeypatch.setenv(last_words.CAUSE, str(tmp_path / "cause"))
    monkeypatch.setenv(last_words.ERROR_FILE, str(tmp_path / "error"))
    monkeypatch.setattr(last_words.time, "sleep", lambda seconds: None)
    return tmp_path


def agreed(tells: bool, expected: bool = True) -> ValueError:
    error = ValueError("no such thing")
    vars(error)[AGREED] = Agreement(tells, expected)
    return error


@pytest.mark.parametrize("tells", [True, False])
def test_one_rank_prints_an_agreed_error(files, monkeypatch, capsys, tells):
    printed = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: printed.append(error))
    last_words.print_agreed_errors_once()
    hook = sys.excepthook
    last_words.print_agreed_errors_once()
    assert sys.excepthook is hook
    error = agreed(tells)
    hook(ValueError, error, None)
    assert printed == [error] * tells
    assert ("rank 0 ends by the same error" in capsys.readouterr().err) is not tells
    told = json.loads((files / "error").read_text())
    assert told["message"]["extraInfo"]["py_callstack"] == "ValueError: no such thing"


def test_other_errors_go_to_the_hook_that_was_there(files, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: printed.append(error))
    last_words.print_agreed_errors_once()
    error = KeyError("mine")
    sys.excepthook(KeyError, error, None)
    assert printed == [error] and not (files / "error").exists()


CASES = {
    "a recipe": (RecipeError("no such thing"), "no such thing", False),
    "a refusal": (agreed(True), "no such thing", False),
    "an agreed bug": (agreed(True, expected=False), "no such thing", True),
    "of another rank": (agreed(False, expected=False), "no such thing", False),
    "a bug": (KeyError("mine"), "rank 0: KeyError: 'mine'", True),
}


def refuse(error: Exception) -> None:
    """Raise an error as code of the package does."""
    source = compile("raise error", "refusal", "exec")
    exec(
        source,
        {"__name__": "hf_context_parallel.refusal" if isinstance(error, RecipeError) else "user", "error": error},
    )


@pytest.mark.parametrize("case", CASES)
def test_a_command_ends_with_the_cause(files, capsys, case):
    error, cause, has_traceback = CASES[case]
    with pytest.raises(SystemExit) as ended, last_words.told():
        refuse(error)
    assert ended.value.code == 1
    assert (files / "cause").read_text() == cause
    assert ("Traceback" in capsys.readouterr().err) == has_traceback


def test_a_refusal_is_printed_where_no_launcher_of_ours_does(files, monkeypatch, capsys):
    monkeypatch.delenv(last_words.CAUSE)
    with pytest.raises(SystemExit, match="no such thing"), last_words.told():
        refuse(RecipeError("no such thing"))
    assert capsys.readouterr().err == ""
