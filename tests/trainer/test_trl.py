"""The module of TRL's trainers: its classes, its messages, and what is refused with them."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL needs Python 3.11")

import trl
from trl.models import activation_offloading
from trl.trainer import sft_trainer

import hf_context_parallel as hcp
import hf_context_parallel.trl as ours
from hf_context_parallel.verification.trainers.cases import CASES, OF_DEEPSPEED, Case
from hf_context_parallel.verification.trainers.run import Result, make_trainer, run
from tests.trainer.test_accelerate import refusal


def test_each_class_is_that_of_trl_with_the_mixin():
    for name in ("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "Distillation"):
        made = getattr(ours, f"{name}Trainer")
        assert made.__mro__[1:3] == (hcp.ContextParallelMixin, getattr(trl, f"{name}Trainer"))
    experimental = importlib.import_module("trl.experimental.orpo").ORPOTrainer
    assert ours.ORPOTrainer.__mro__[1:3] == (hcp.ContextParallelMixin, experimental)
    assert ours.ORPOTrainer is ours.ORPOTrainer
    with pytest.raises(AttributeError, match="no attribute 'NoTrainer'"):
        _ = ours.NoTrainer


@pytest.mark.parametrize(
    ("version", "said"), [("1.15.3", "TRL 1.15.3 is older than 1.16"), (None, "needs TRL: `pip install 'trl>=1.16'`")]
)
def test_a_missing_or_old_trl_is_told(monkeypatch, version, said):
    monkeypatch.delitem(sys.modules, "hf_context_parallel.trl")
    if version is None:
        monkeypatch.setitem(sys.modules, "trl", None)
    else:
        monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=said.replace("(", r"\(")):
        importlib.import_module("hf_context_parallel.trl")


def test_a_newer_trl_is_told(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "hf_context_parallel.trl")
    monkeypatch.setattr(trl, "__version__", "9.1.0")
    importlib.import_module("hf_context_parallel.trl")
    assert "TRL 9.1.0 is newer than 1.16, with which trainers were compared" in caplog.text


def test_a_trl_without_a_method_of_the_mixin_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_context_parallel.trl")
    monkeypatch.delattr(trl.RLOOTrainer, "_generate_single_turn")
    with pytest.raises(ValueError, match=r"trl .* has no RLOOTrainer._generate_single_turn"):
        importlib.import_module("hf_context_parallel.trl")


def make_dynamic(case: Case, folder: str) -> None:
    dynamic = hcp.ContextParallelConfig(size=2, dynamic=True, max_tokens_per_rank=64)
    with mock.patch("hf_context_parallel.verification.trainers.run.ContextParallelConfig", lambda size: dynamic):
        make_trainer(case, 2, 1, folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SFT", "those of TRL log the mean over their calls"),
        pytest.param("Trainer, ZeRO-1", "DeepSpeed counts each run", marks=pytest.mark.exhaustive),
    ],
)
def test_what_dynamic_groups_cannot_do_is_refused(on_ranks, tmp_path, name, said):
    for found in on_ranks(2, refusal, make_dynamic, {**CASES, **OF_DEEPSPEED}[name], str(tmp_path)):
        assert said in found


def with_offloading(case: Case, folder: str) -> Result:
    """Train with TRL's activation offloading, which copies within the host here, without streams and pinned memory."""
    options = {"use_pin_memory": False, "use_streams": False, "min_offload_size": 0}
    made = partial(activation_offloading.get_act_offloading_ctx_manager, **options)
    with (
        mock.patch.object(sft_trainer, "get_act_offloading_ctx_manager", made),
        mock.patch.object(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu")),
        mock.patch.object(torch.cpu, "empty_cache", lambda: None, create=True),
    ):
        return run(replace(case, options={**case.options, "activation_offloading": True}), folder, 2)


@pytest.mark.parametrize("name", ["SFT", pytest.param("SFT, LoRA, checkpointing", marks=pytest.mark.exhaustive)])
def test_activation_offloading_changes_nothing(on_ranks, tmp_path, name):
    case = CASES[name]
    [expected] = on_ranks(1, run, case, str(tmp_path), 0)
    for found in on_ranks(2, with_offloading, case, str(tmp_path)):
        assert found.is_sharded
        np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-6, atol=1e-8)
        for mine, theirs in zip(found.logs, expected.logs, strict=True):
            assert mine == pytest.approx({name: theirs[name] for name in mine}, rel=case.bound)
