"""Refusals of calls that do not pass on what `cp.shard` yields."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.models import context, labelled, loss_in, tiny_model, tokens


def test_calls_without_all_that_shard_yields_are_refused():
    model = tiny_model("llama", "context_parallel")
    for left_out in ("position_ids", "use_cache", "shift_labels", "num_items_in_batch"):
        with pytest.raises(ValueError, match=r"cp\.shard yields"), context().shard(labelled(), model) as local:
            model(**{name: value for name, value in local.items() if name != left_out})
    with pytest.raises(ValueError, match=r"cp\.shard yields"), context().shard(labelled(), model) as local:
        model.generate(local["input_ids"], max_new_tokens=1)


def test_labels_that_were_changed_alone_are_refused():
    model = tiny_model("llama", "context_parallel")
    with context().shard(labelled(), model) as local:
        assert local["labels"] is local["shift_labels"]
        local["labels"] = local["labels"].clone()
        model(**local)  # the same still
        local["labels"][0, :5] = -100
        with pytest.raises(ValueError, match="labels and shift_labels differ"):
            model(**local)


def test_keeping_the_last_logits_is_refused():
    with pytest.raises(ValueError, match="logits_to_keep would keep the last tokens of each rank's shard"):
        loss_in(labelled(), tiny_model("llama", "context_parallel"), logits_to_keep=1)


def test_a_model_that_compares_tokens_with_their_own_labels_needs_those():
    batch = {"input_ids": tokens(2, 19), "shift_labels": tokens(2, 19)}
    with pytest.raises(ValueError, match="Give labels"):
        loss_in(batch, tiny_model("xlnet", "context_parallel"))


def test_cross_attention_is_refused():
    model = tiny_model("gpt2", "context_parallel", add_cross_attention=True)
    with (
        pytest.raises(ValueError, match="encoder_hidden_states: cross-attention"),
        context().shard(labelled(), model) as local,
    ):
        model(**local, encoder_hidden_states=torch.zeros(2, 20, model.config.n_embd, dtype=torch.float64))
