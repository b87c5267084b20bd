"""Tests of the tables that the survey of all types has made."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import hf_context_parallel as hcp
from hf_context_parallel.integration.model_registry import KNOWN, KNOWN_MULTIMODAL, NAME, known_states
from hf_context_parallel.integration.switches import sharded_on_one_rank
from hf_context_parallel.verification.types import survey
from hf_context_parallel.verification.types.command import PAGE, PAGE_MULTIMODAL
from hf_context_parallel.verification.types.tiny import VOCABULARY, is_encoder, tiny_config, tiny_model
from tests.helpers.models import needs_the_tables_version


def test_tensor_parallelism_of_types_without_a_plan_or_that_fail_finds_nothing_more(monkeypatch):
    """Sequence parallelism is compared for types that are exact without it, of which there may be none."""
    wrong = survey.Finding("apertus", "wrong", reason="as it is")
    monkeypatch.setattr(survey, "examine", lambda pool, model, *_: wrong)
    monkeypatch.setattr(survey, "WorkerPool", lambda *_: SimpleNamespace(close=lambda: None))
    assert survey.survey_tensor_parallel(["apertus"], 2, 1, lambda finding: None) == [wrong]
    assert survey.survey_tensor_parallel(["bert"], 2, 1, lambda finding: None) == []


@needs_the_tables_version
def test_every_type_is_known_and_few_are_refused():
    known = known_states()
    assert sorted(known) == survey.model_types()
    refused = [name for name, finding in known.items() if finding["state"] == "refused"]
    assert len(refused) < len(known) / 8
    assert all(known[name]["reason"] for name in refused)


@pytest.mark.exhaustive
@needs_the_tables_version
def test_what_is_known_as_exact_is_not_refused():
    """Build models as a user does, by the class's own configuration, whose type may differ from that in the table."""
    exact = [name for name, finding in known_states().items() if finding["state"] != "refused"]
    cp = hcp.ContextParallel(hcp.ContextParallelConfig())
    with torch.device("meta"):
        for name in exact:
            config = tiny_config(name)
            auto = AutoModelForMaskedLM if is_encoder(config) else AutoModelForCausalLM
            hcp.parallelize(auto.from_config(config, attn_implementation=NAME), cp)


@pytest.mark.exhaustive
@needs_the_tables_version
def test_every_type_that_is_known_as_exact_runs_in_a_block():
    cp = hcp.ContextParallel(hcp.ContextParallelConfig())
    for name in (name for name, finding in known_states().items() if finding["state"] != "refused"):
        model = tiny_model(tiny_config(name), NAME, torch.float32)
        input_ids = torch.randint(3, VOCABULARY, (1, 40))
        batch = {"input_ids": input_ids, "labels": input_ids}
        if not is_encoder(model.config):
            with cp.shard(batch, model) as local:
                assert model(**local).loss.isfinite(), name
        with sharded_on_one_rank():
            assert hcp.parallelize(model, cp)(**batch).loss.isfinite(), name


def test_the_page_shows_what_is_known():
    import json

    assert PAGE.read_text() == survey.page_of(json.loads(KNOWN.read_text()))


def test_the_page_of_models_with_media_shows_what_is_known():
    import json

    known = json.loads(KNOWN_MULTIMODAL.read_text())
    assert PAGE_MULTIMODAL.read_text() == survey.page_of(known, media=True)
    assert all(finding["reason"] for finding in known["types"].values() if finding["state"] == "refused")


@needs_the_tables_version
def test_every_type_with_media_is_known():
    import json

    known = json.loads(KNOWN_MULTIMODAL.read_text())["types"]
    assert sorted(known) == survey.model_types(media=True)
