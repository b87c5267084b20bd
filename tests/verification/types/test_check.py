"""Check of model types: its findings, and errors that it must find."""

from __future__ import annotations

import re

import pytest
import torch

from hf_context_parallel.integration import model_registry
from hf_context_parallel.integration.model_registry import known_states, known_tensor_parallel
from hf_context_parallel.verification.types import check, survey
from hf_context_parallel.verification.types.tiny import tiny_config, tiny_model
from tests.helpers.models import needs_chunks_of_documents, needs_sharding_while_loading

SAMPLE = {
    "llama4_text": (2, 3),  # chunks, and a temperature that follows positions
    "gemma3_text": (4,),  # windows
    "gemma2": (3,),  # softcap
    "gpt_oss": (2, 3),  # sinks, and a router's loss
    "deepseek_v3": (3,),  # values narrower than keys
    "mistral": (1,),
    "modernbert-decoder": (3,),
    "bert": (3,),  # bidirectional
    "qwen3_next": (3,),  # gated delta net
    "nemotron_h": (2,),  # Mamba 2
    "lfm2": (4,),  # short convolutions
    "bloom": (3,),  # ALiBi
    "gpt_neo": (2,),  # a table of attentions of its own
    "inkling2_loop_text": (2,),  # distances that the model makes for all layers, and attention to earlier layers
    "opt": (3,),  # positions counted from the mask
    "whisper": (2,),  # labels that are not shifted
    "deepseek_v32": (3,),  # picks its keys
    "xlnet": (3,),  # sees whole sequences
    "git": (2,),
}
"""Types of every kind, and the sizes of the CP groups that they are checked on."""
ELSEWHERE = {"gemma2", "modernbert-decoder", "nemotron_h", "lfm2", "opt", "git", "YaRN", "temperature"}
"""Types and settings whose kind another test compares too: make test-all alone examines them."""


def needing_marks(types: dict[str, str]) -> list:
    """Make test parameters of model types, with the marks that each type needs."""
    return [
        pytest.param(
            name,
            marks=[needs_chunks_of_documents] * (model_type == "llama4_text")
            + [pytest.mark.exhaustive] * (name in ELSEWHERE),
        )
        for name, model_type in types.items()
    ]


@pytest.mark.parametrize("model_type", needing_marks({model_type: model_type for model_type in SAMPLE}))
def test_what_is_known_of_a_type_is_so(on_ranks, model_type):
    found = survey.examine(on_ranks, model_type, SAMPLE[model_type], {})
    known = known_states()[model_type]
    assert (found.state, found.handled) == (known["state"], known["handled"]), found.reason


@needs_sharding_while_loading
@pytest.mark.parametrize(
    ("model_type", "state"),
    [
        ("deepseek_v3", "exact"),
        pytest.param("glm_moe_dsa", "exact by resharding", marks=pytest.mark.exhaustive),
        pytest.param("apertus", "wrong", marks=pytest.mark.exhaustive),
    ],
)
def test_what_is_known_of_a_type_with_tensor_parallelism_is_so(on_ranks, model_type, state):
    """Check types with a router in float32, with layers of FSDP in a whole model, and with a wrong plan."""
    found = survey.examine(on_ranks, model_type, [2], {}, 2)
    assert found.state == state, found.reason
    assert (known_tensor_parallel()[model_type]["state"] == "exact") == (state != "wrong")


SETTINGS = {
    "dynamic RoPE": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "LongRoPE": ("phi3", None),
    "YaRN": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "bidirectional windows": ("gemma3_text", {"use_bidirectional_attention": True}),
    "tied weights": ("qwen2", {"tie_word_embeddings": True}),
    "temperature": ("llama4_text", {"attn_temperature_tuning": True, "floor_scale": 4}),
    "heads that three ranks do not divide": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 8}),
}


def largest_error(model_type: str, changes: dict) -> float:
    found, _ = check.errors(tiny_config(model_type, **changes), {})
    return max(max(errors.loss, errors.gradients) for errors in found.values())


@pytest.mark.parametrize("name", needing_marks({name: model_type for name, (model_type, _) in SETTINGS.items()}))
def test_settings_that_look_at_the_whole_are_exact(on_ranks, name):
    model_type, changes = SETTINGS[name]
    if name == "dynamic RoPE":
        changes = {**changes, "max_position_embeddings": 30}  # shorter than the rows, longer than the documents
    if name == "LongRoPE":
        half = tiny_config("phi3").hidden_size // tiny_config("phi3").num_attention_heads // 2
        factors = {"short_factor": [1.0] * half, "long_factor": [3.0] * half}
        rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors, "original_max_position_embeddings": 16}
        changes = {"rope_parameters": rope, "original_max_position_embeddings": 16, "max_position_embeddings": 256}
    assert max(on_ranks(3, largest_error, model_type, changes)) < 1e-9


def error_without_resharding() -> float:
    model_registry.SEES_WHOLE, kept = re.compile("nothing"), model_registry.SEES_WHOLE
    try:
        return largest_error("lfm2", {})
    finally:
        model_registry.SEES_WHOLE = kept


def test_a_mixer_that_nobody_handles_shows(on_ranks):
    assert min(on_ranks(2, error_without_resharding)) > 1e-3


def test_unrounded_models_compute_in_float64():
    x = torch.rand(3, dtype=torch.float64)
    with check.Unrounded():
        assert x.float().dtype == x.to(torch.float32).dtype == x.softmax(-1, dtype=torch.float32).dtype == x.dtype
        assert x.to(torch.int64).dtype == torch.int64
    assert x.float().dtype == torch.float32


def test_a_tiny_ernie_keeps_a_layer_with_experts():
    model = tiny_model(tiny_config("ernie4_5_moe"), None)
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, True]
