"""Trainers of TRL, adapters of PEFT: training runs on shards against the same runs without CP."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import BitsAndBytesConfig

pytest.importorskip("trl", reason="TRL needs Python 3.11")

from hf_context_parallel.verification.trainers import run
from hf_context_parallel.verification.trainers.cases import TABLES
from hf_context_parallel.verification.trainers.compare import (
    Finding,
    Result,
    compare,
    largest_error,
    page,
    select,
)
from tests.helpers.trainer import steps_of
from tests.trainer.test_accelerate import launched, launcher_environment

CASES = dict(select([]))
PAGE = Path(__file__).parents[3] / "docs" / "trainers.md"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if case.quick else pytest.mark.exhaustive) for name, case in CASES.items()]
)
def test_a_run_is_that_without_cp(on_ranks, name):
    finding = compare(name, CASES[name], on_ranks)
    assert finding.state == ("exact" if CASES[name].refused is None else "refused"), finding
    [row] = [line for line in PAGE.read_text().splitlines() if [x.strip() for x in line.split("|")][1:2] == [name]]
    assert finding.state in row


def qlora(folder: str, size: int) -> tuple[bool, list[tuple[float, float]]]:
    """Train adapters of a model of 4 bits, whose storage FSDP2 can divide."""
    storage = {"bnb_4bit_quant_storage": torch.float32, "bnb_4bit_compute_dtype": torch.float32}
    with mock.patch.object(run, "BitsAndBytesConfig", lambda **bits: BitsAndBytesConfig(**bits, **storage)):
        trainer = run.make_trainer(CASES["QLoRA, 4 bits"], size, 1, folder)
    trainer.train()
    return isinstance(trainer.model_wrapped, FSDPModule), steps_of(trainer)


@pytest.mark.exhaustive
def test_qlora_under_fsdp2_is_that_of_one_process(on_ranks, tmp_path):
    [(_, expected)] = on_ranks(1, qlora, f"{tmp_path}/whole", 0)
    for is_sharded, found in on_ranks(2, launched, launcher_environment(), qlora, f"{tmp_path}/shards", 2):
        assert is_sharded
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def result(**figures: float) -> Result:
    return Result([figures], np.array([1.0, -2.0]), True)


def test_every_number_of_a_run_is_compared():
    right = result(loss=2.0, norm=float("nan"))
    assert largest_error(right, right) == (0.0, "the weights")
    error, worst = largest_error(result(loss=2.1, norm=float("nan")), right)
    assert (error, worst) == (pytest.approx(0.05), "loss of log 1")
    assert largest_error(result(loss=2.0), right) == (float("inf"), "norm of log 1")
    assert largest_error(result(loss=2.0, norm=1.0), right) == (float("inf"), "norm of log 1")
    assert largest_error(right._replace(weights=np.array([1.0, -2.2])), right)[0] == pytest.approx(0.1)
    assert largest_error(right._replace(logs=[]), right)[0] == float("inf")


def test_the_page_has_a_row_for_each_run():
    """Changing the cases without running `check --trainers --write` fails here."""
    made = page([Finding(name, "exact", {"CP 2": 1e-16, "DP 2 x CP 2": 1e-7}) for name in CASES])
    pages = made, PAGE.read_text()
    names, kept = ([line.split("|")[1].strip() for line in text.splitlines() if line[:2] == "| "] for text in pages)
    assert kept == names
    assert len(names) == len(CASES) + len(TABLES)
