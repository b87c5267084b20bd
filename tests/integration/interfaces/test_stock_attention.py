"""Models outside of `cp.shard`: with our attention loaded, they compute as Transformers would have loaded them."""

from __future__ import annotations

import pytest
import torch

import hf_context_parallel as hcp  # noqa: F401 (registers the attention)
from hf_context_parallel.integration.interfaces.planned_mask import PlannedMask
from hf_context_parallel.integration.interfaces.stock_attention import unsharded_implementation, whole_mask
from hf_context_parallel.integration.model_registry import TEXT_ALONE
from hf_context_parallel.planning.mask import Pattern
from tests.helpers.models import document_positions, some_labels, tiny_model, tokens

TYPES = {
    "llama": {},
    "gpt2": {},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 6},  # sinks: eager
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "attn_logit_softcapping": 1.0},  # eager
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
}


def pair(model_type: str):
    """Make the model with the default attention of Transformers, and with ours."""
    return [
        tiny_model(model_type, how, torch.float32, **TYPES[model_type]).eval() for how in (None, "context_parallel")
    ]


@pytest.mark.parametrize("model_type", TYPES)
def test_losses_and_gradients_are_the_same_bits(model_type):
    input_ids = tokens(2, 13)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    packed = {"input_ids": tokens(1, 12), "position_ids": document_positions(5, 7), "use_cache": False}
    for batch in (
        {"input_ids": input_ids},
        {"input_ids": input_ids, "attention_mask": mask},
        {"input_ids": input_ids, "attention_mask": mask.flip(1)},
        packed,
    ):
        batch = {**batch, "labels": some_labels(batch["input_ids"])}
        grads = []
        for model in pair(model_type):
            model.train()
            model(**batch).loss.backward()
            grads.append([parameter.grad for parameter in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads) if a is not None)


@pytest.mark.parametrize("model_type", TYPES)
def test_generation_of_a_left_padded_batch_is_the_same(model_type):
    input_ids = tokens(2, 9)
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    scores = []
    for model in pair(model_type):
        out = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        scores.append(torch.stack(out.scores))
    assert torch.equal(*scores)


def test_a_configuration_that_transformers_does_not_know_says_what_to_do():
    from transformers import PreTrainedConfig

    class UnknownConfig(PreTrainedConfig):
        model_type = "unknown"

    with pytest.raises(ValueError, match="attn_implementation='sdpa' or 'eager'"):
        unsharded_implementation(UnknownConfig)


def test_a_composite_model_can_keep_its_vision_tower_on_sdpa():
    """Transformers accepts the dictionary that our refusals recommend."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 1},
    )
    chosen = TEXT_ALONE
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=chosen)
    assert model.config.text_config._attn_implementation == "context_parallel"
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["falcon", "deepseek_v32", "minimax_m3_vl_text"])
def test_a_model_that_asks_for_the_name_of_its_attention_is_not_run_by_ours(model_type):
    """Types that ask for the name of their attention would silently compute something else outside of a block."""
    model, stock = tiny_model(model_type, "context_parallel"), tiny_model(model_type, None)
    batch = {"input_ids": tokens(1, 12), "use_cache": False}
    with pytest.raises(ValueError, match="asks what its attention is called"):
        model(**batch)
    if model_type != "falcon":  # whose class does not allow it
        model.set_attn_implementation("eager")
        assert torch.allclose(model(**batch).logits, stock(**batch).logits, atol=1e-6)


@pytest.mark.parametrize("model_type", ["emu3", "mllama"])
def test_parts_of_composite_models_run_unsharded(model_type):
    model, stock = tiny_model(model_type, "context_parallel"), tiny_model(model_type, None)
    batch = {"input_ids": tokens(1, 12), "use_cache": False}
    assert torch.equal(model(**batch).logits, stock(**batch).logits)


@pytest.mark.parametrize("allowed", [True, False])
def test_whole_sequences_get_a_causal_mask_whatever_transformers_would_skip(allowed):
    """Transformers allows skipping only on ranks whose positions are consecutive, and all ranks compute alike."""
    options = {"allow_is_causal_skip": allowed, "allow_is_bidirectional_skip": False}
    mask = PlannedMask(Pattern(), tiny_model("llama", "context_parallel").config, options)
    made = whole_mask(mask, 2, 5, None, torch.zeros(1))
    assert made.bool().equal(torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5))
