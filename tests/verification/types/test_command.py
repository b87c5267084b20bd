"""Tests of the command `hf-context-parallel check`."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import hf_context_parallel as hcp
from hf_context_parallel.verification.types import survey
from hf_context_parallel.verification.types.command import run_check
from hf_context_parallel.verification.types.tiny import tiny_config
from tests.helpers.models import context


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


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class TheirConfig(LlamaConfig):
    model_type = "comes_with_its_code"

class TheirForCausalLM(LlamaForCausalLM):
    config_class = TheirConfig
"""


@pytest.mark.exhaustive
def test_a_model_that_comes_with_its_code_is_checked(tmp_path, capsys):
    config = tiny_config("llama").to_dict() | {"model_type": "comes_with_its_code"}
    config["auto_map"] = {
        "AutoConfig": "modeling_theirs.TheirConfig",
        "AutoModelForCausalLM": "modeling_theirs.TheirForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_theirs.py").write_text(REMOTE_CODE)
    assert run_check(str(tmp_path), False, "2", "p2p", None, False) == 1
    assert "trust_remote_code" in capsys.readouterr().err
    assert run_check(str(tmp_path), False, "2", "p2p", None, False, trust_remote_code=True) == 0
    assert "exact" in capsys.readouterr().out
    full = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(full, trust_remote_code=True, attn_implementation="context_parallel")
    hcp.parallelize(model, context())  # what was found exact is not refused


@pytest.mark.exhaustive
def test_a_type_that_a_module_registers_is_checked(capsys):
    module = "tests.helpers.registered_model"
    assert run_check("registered_by_a_user", False, "2", "p2p", None, False, module=module) == 0
    assert "exact" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, False, "2", "p2p", None, False), "or --all"),
        (("llama", True, "2", "p2p", None, False), "or --all"),
        (("llama", False, "two", "p2p", None, False), "--ranks='two'"),
        (("llama", False, "2", "ring", None, False), "--comm='ring' is not one of p2p"),
        (("llama", False, "2", "p2p", None, True), "--write needs --all"),
        (("llava", False, None, "p2p", None, False, 2, False, None, True), "--tp=2 compares text alone"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, capsys):
    assert run_check(*arguments) == 2
    assert message in capsys.readouterr().err
