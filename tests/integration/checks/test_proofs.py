"""Models that no table has: admitted when they were found exact, refused otherwise."""

from __future__ import annotations

import json

import pytest
import torch

import hf_context_parallel as hcp
from hf_context_parallel.integration.checks import proofs
from tests.helpers.border import mean_gradients
from tests.helpers.models import context, error, tiny_model, tokens
from tests.helpers.own_model import own_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep proofs in a folder of the test."""
    monkeypatch.setattr(proofs, "PROOFS", tmp_path / "cache" / "proofs.json")
    monkeypatch.setattr(proofs, "_proven", set())
    return proofs.PROOFS


def errors_of_own_model(path) -> tuple[str, float]:
    proofs.PROOFS, proofs._proven = path, set()
    whole, sharded, cp = own_model("sdpa"), own_model("context_parallel"), context()
    with pytest.raises(proofs.Unproven) as refusal:
        hcp.parallelize(sharded, cp)
    hcp.verify(sharded, cp)
    proofs._proven.clear()  # another process reads the cache
    hcp.parallelize(sharded, cp)
    ids = tokens(2, 19)
    expected, found = (model(ids).last_hidden_state.pow(2).mean() for model in (whole, sharded))
    expected.backward()
    found.backward()
    pairs = zip(mean_gradients(sharded), whole.parameters())
    return str(refusal.value), max(error(found, expected), *(error(a, b.grad) for a, b in pairs))


def test_a_model_of_the_user_is_admitted_when_it_was_found_exact(on_ranks, cache):
    for refusal, worst in on_ranks(2, errors_of_own_model, cache):
        assert "'own_model_of_a_user' is in no table" in refusal and "hf_context_parallel.verify(model, cp)" in refusal
        assert worst < 1e-7
    assert list(json.loads(cache.read_text()).values()) == ["OwnModel"]


def message_about_a_mixing_model(path) -> str:
    proofs.PROOFS, proofs._proven = path, set()
    model, cp = own_model("context_parallel", mixes=True), context()
    with pytest.raises(ValueError) as refusal:
        hcp.verify(model, cp)
    with pytest.raises(proofs.Unproven):
        hcp.parallelize(model, cp)
    return str(refusal.value)


def test_a_model_that_mixes_tokens_by_itself_is_refused(on_ranks, cache):
    first, second = on_ranks(2, message_about_a_mixing_model, cache)
    assert first == second and "is not exact on shards" in first
    assert not cache.exists()


def test_a_decoder_with_a_forward_of_its_own_needs_a_proof():
    model, cp = tiny_model("llama", "context_parallel", torch.float32), context()
    stock = model.model.forward
    model.model.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    with pytest.raises(proofs.Unproven, match="has a forward of its own"):
        hcp.parallelize(model, cp)
    hcp.verify(model, cp)
    hcp.parallelize(model, cp)


def test_a_proof_is_for_any_size_and_no_other_setting():
    def identity(**changes) -> str:
        return proofs.identity(tiny_model("llama", "context_parallel", torch.float32, **changes).model)

    assert identity() == identity(hidden_size=64, num_hidden_layers=3, vocab_size=99)
    assert identity() != identity(attention_bias=True)
    prepared = tiny_model("llama", "context_parallel", torch.float32)
    assert proofs.identity(hcp.parallelize(prepared, context()).model) == identity()
    assert proofs.identity(own_model("context_parallel")) != identity()


def test_weights_that_are_no_numbers_are_named():
    model = tiny_model("llama", "context_parallel", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(1 of its .* holds NaN"):
        hcp.verify(model, context())
