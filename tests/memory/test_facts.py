"""Facts of models, read from their configurations."""

import pytest
from transformers import AutoConfig, LlamaConfig

from hf_context_parallel.compat import layer_configs
from hf_context_parallel.memory.facts import facts_of
from hf_context_parallel.verification.types.tiny import tiny_config
from tests.helpers.models import needs_the_tables_version

TINY = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 10}


def test_llama():
    facts = facts_of(LlamaConfig(**TINY))
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8
    assert (facts.layers, facts.hidden, facts.intermediate, facts.vocabulary) == (3, 8, 12, 10)
    assert (facts.heads, facts.key_heads, facts.query_dim, facts.value_dim) == (4, 2, 2, 2)
    assert (facts.layer_parameters, facts.head_parameters, facts.tied) == (layer, 80, False)
    assert facts.parameters == facts.trained_parameters == 3 * layer + 2 * 80 + 8
    assert (facts.full_layers, facts.window, facts.experts, facts.active_experts) == (3, None, 0, 1)


def test_lora_trains_two_small_weights_for_each_linear_layer():
    facts = facts_of(LlamaConfig(**TINY), lora_rank=2)
    assert facts.trained_parameters == 2 * 3 * (16 + 12 + 12 + 16 + 3 * 20)
    assert facts.parameters == facts_of(LlamaConfig(**TINY)).parameters


def test_quantised_weights_are_those_of_linear_layers():
    facts = facts_of(LlamaConfig(**TINY), lora_rank=2, bits=4)
    assert facts.quantized_parameters == 3 * (facts.layer_parameters - 2 * 8)
    assert (facts.quantized_bits, facts.dequantized) == (4.5, 8 * 12)


def test_tied_embeddings_are_counted_once():
    facts = facts_of(LlamaConfig(**TINY, tie_word_embeddings=True))
    assert facts.tied and facts.parameters == 3 * facts.layer_parameters + 80 + 8


def test_layers_by_kind():
    sizes = {**TINY, "head_dim": 2}
    gemma = facts_of(AutoConfig.for_model("gemma3_text", **sizes, sliding_window=5, layer_types=None))
    assert (gemma.window, gemma.window_layers, gemma.full_layers) == (5, 3, 0)
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
    qwen = facts_of(AutoConfig.for_model("qwen3_moe", **sizes, **mixture))
    assert (qwen.experts, qwen.active_experts, qwen.intermediate) == (4, 2, 6)
    types = ["linear_attention", "linear_attention", "full_attention"]
    hybrid = facts_of(AutoConfig.for_model("qwen3_next", **sizes, **mixture, layer_types=types))
    assert (hybrid.linear_layers, hybrid.full_layers) == (2, 1)


@needs_the_tables_version
def test_layers_of_several_widths_count_as_the_widest():
    config = tiny_config("dots3_note_text")
    heads = {layer.num_attention_heads for layer in layer_configs(config)}
    assert len(heads) > 1 and facts_of(config).heads == max(heads)


def test_layers_under_another_name():
    facts = facts_of(AutoConfig.for_model("gpt2", n_embd=8, n_head=2, n_layer=3, vocab_size=10))
    assert (facts.layers, facts.hidden, facts.intermediate, facts.heads, facts.key_heads) == (3, 8, 32, 2, 2)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="has no list of layers that Transformers can checkpoint"):
        facts_of(AutoConfig.for_model("xlnet", d_model=8, n_head=2, n_layer=1, d_inner=8, vocab_size=10))
