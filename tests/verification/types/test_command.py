"""Tests of the command `hf-context-parallel check`."""

from __future__ import annotations

import pytest

from hf_context_parallel.verification.types import survey
from hf_context_parallel.verification.types.command import run_check
from hf_context_parallel.verification.types.tiny import tiny_config


def test_a_check_prints_a_table_and_fails_where_something_is_wrong(capsys):
    assert run_check("git", False, "2", "p2p", None, False) == 0
    assert "refused" in capsys.readouterr().out
    assert run_check("no-such-model", False, "2", "p2p", None, False) == 1
    printed = capsys.readouterr()
    assert "wrong" in printed.out and "no-such-model" in printed.err


def test_a_folder_is_checked_by_its_configuration(on_ranks, tmp_path):
    tiny_config("gemma2").save_pretrained(tmp_path)
    finding = survey.examine(on_ranks, str(tmp_path), (2,), {})
    assert finding.state == "exact" and set(finding.handled) == {"Gemma2Attention"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, False, "2", "p2p", None, False), "or --all"),
        (("llama", True, "2", "p2p", None, False), "or --all"),
        (("llama", False, "two", "p2p", None, False), "--ranks='two'"),
        (("llama", False, "2", "ring", None, False), "--comm='ring' is not one of p2p"),
        (("llama", False, "2", "p2p", None, True), "--write needs --all"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, capsys):
    assert run_check(*arguments) == 2
    assert message in capsys.readouterr().err
