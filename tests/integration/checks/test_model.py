"""Refusals of models that would give wrong numbers on shards."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from hf_context_parallel import parallelize
from hf_context_parallel.integration.model_registry import TEXT_ALONE
from hf_context_parallel.verification.types import tiny
from hf_context_parallel.verification.types.tiny import tiny_config
from tests.helpers.models import context, document_positions, labelled, loss_in, tiny_model, tokens


def test_a_model_without_our_attention_is_noticed():
    model = tiny_model("llama", "sdpa")
    with pytest.raises(ValueError, match="set_attn_implementation"), context().shard(labelled(), model):
        pass
    with pytest.raises(ValueError, match="set_attn_implementation"), context().shard(labelled()) as local:
        model(**local)
    changed = tiny_model("llama", "context_parallel")
    for layer in changed.model.layers:  # a copy of the configuration, as some wrappers make one
        layer.self_attn.config = model.config
    with (
        pytest.raises(ValueError, match="computes with its attention mask itself"),
        context().shard(labelled(), changed) as local,
    ):
        changed(**local)


def test_heads_and_losses_that_are_not_causal_language_modelling_are_refused():
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

    config = tiny_config("llama")
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model = auto.from_config(config, attn_implementation="context_parallel")
        with (
            pytest.raises(ValueError, match="not one of Transformers' causal language models"),
            context().shard(labelled()) as local,
        ):
            model(**local)
    model = tiny_model("llama", "context_parallel")

    class Mine(type(model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="a forward of its own"), context().shard(labelled(), Mine(model.config)):
        pass
    model.loss_function = lambda *args, **kwargs: 0.0
    with pytest.raises(ValueError, match="a loss function of its own"), context().shard(labelled(), model):
        pass
    model = AutoModel.from_config(config, attn_implementation="context_parallel")
    with context().shard({"input_ids": tokens(1, 5)}, model) as local:
        assert model(**local).last_hidden_state.shape == (1, 6, 32)


def refused_model(change: str):
    """Make a model that cannot be exact on shards."""
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    changes = {
        "a refused type": ("prophetnet", {}),
        "layers skipped at random": ("opt", {"layerdrop": 0.1}),
        "an encoder": ("bart", {}),
        "an image's tokens": ("git", {}),
        "packed documents and dynamic RoPE": ("llama", {"rope_parameters": scaled, "max_position_embeddings": 4}),
    }
    model_type, values = changes[change]
    config = tiny.tiny_config(model_type, **values)
    if model_type == "bart":
        return AutoModel.from_config(config, attn_implementation="context_parallel")
    if model_type == "git":  # its attention does not accept our name
        return tiny.tiny_model(config, None, torch.float32).train()
    return tiny.tiny_model(config, "context_parallel", torch.float32).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a refused type", "'prophetnet' is refused: it predicts several tokens at a time"),
        ("layers skipped at random", "layerdrop=0.1"),
        ("an encoder", "BartModel is an encoder and a decoder"),
        ("an image's tokens", "'git' is refused: it needs images"),
        ("packed documents and dynamic RoPE", "depends on their order"),
    ],
)
def test_models_that_would_not_be_exact_are_refused_by_name(change, message):
    model = refused_model(change)
    batch = {**labelled(1, 10), "position_ids": document_positions(6, 4)}
    with pytest.raises(ValueError, match=message), context().shard(batch, model) as local:
        model(**local)
    with pytest.raises(ValueError, match=message):
        parallelize(model, context())(**batch)


def test_a_model_that_was_not_prepared_is_refused():
    model = tiny_model("llama", "context_parallel")
    with pytest.raises(ValueError, match=r"was not prepared\. Pass it"), context().shard(labelled()) as local:
        model(**local)
    parallelize(model, context())
    with context().shard(labelled()) as local:
        assert model(**local).loss.isfinite()


@pytest.mark.filterwarnings("error")
def test_a_call_that_raised_does_not_hide_the_next_one():
    model, teacher = tiny_model("llama", "context_parallel"), tiny_model("llama", None)
    with pytest.raises(ValueError, match="set_attn_implementation"), context().shard(labelled(), model) as local:
        with pytest.raises(ValueError, match="not know"):
            model(**local, rescale=30.0)
        teacher(**local)


def test_every_model_in_a_block_is_checked():
    model, teacher = tiny_model("llama", "context_parallel"), tiny_model("llama", None)
    with pytest.raises(ValueError, match="set_attn_implementation"), context().shard(labelled(), model) as local:
        model(**local)
        teacher(**local)


def patched(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


def test_a_forward_patched_on_a_model_is_refused():
    model = tiny_model("llama", "context_parallel")
    model.forward = types.MethodType(patched, model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .* has a forward of its own, as fused losses"):
        loss_in(labelled(), model)


def test_a_forward_patched_on_the_class_is_refused(monkeypatch):
    model = tiny_model("llama", "context_parallel")
    stock = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *args, **kwargs: stock(self, *args, **kwargs))
    with pytest.raises(ValueError, match="has a forward of its own"):
        loss_in(labelled(), model)


def test_a_forward_that_is_only_wrapped_is_not():
    """A forward that accelerate has wrapped for autocast is accepted."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    model = tiny_model("llama", "context_parallel")
    expected = loss_in(labelled(), model)
    model.forward = convert_outputs_to_fp32(model.forward)
    assert loss_in(labelled(), model) == expected


def test_a_part_of_a_model_with_a_loss_does_not_run_unseen():
    model = tiny_model("qwen3_moe", "context_parallel")
    with (
        pytest.raises(ValueError, match=r"Qwen3MoeModel runs by itself"),
        context().shard(labelled(), model) as local,
    ):
        model.model(**{name: value for name, value in local.items() if name != "labels"})
    with context().shard({"input_ids": tokens(2, 19)}, model) as local:  # no loss, nothing to be missed
        model.model(**local)


def test_a_router_that_mixes_the_tokens_of_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"'doge' is refused with is_moe=True: its experts are chosen by logits of"):
        loss_in(labelled(), tiny_model("doge", "context_parallel", is_moe=True))


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "llama4", "mllama"])
def test_the_dictionary_that_refusals_recommend_runs(model_type):
    """The dictionary runs with its entry for the whole model, and without it where there is a vision tower."""
    config = tiny.tiny_config(model_type)
    for chosen in [TEXT_ALONE] + [{k: v for k, v in TEXT_ALONE.items() if k}] * (model_type in ("gemma3", "gemma4")):
        names = {"", *config.sub_configs}
        asked = {part: name for part, name in chosen.items() if part in names}
        model = AutoModelForCausalLM.from_config(config, attn_implementation=asked)
        assert loss_in(labelled(), model).isfinite()
