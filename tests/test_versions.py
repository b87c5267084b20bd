"""A sample of model types, short enough to run with several versions of Transformers."""

from __future__ import annotations

import pytest

from hf_context_parallel.verification.types import survey

pytestmark = pytest.mark.versions

SAMPLE = (
    *("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "olmo2", "glm4"),  # rings
    *("qwen3_moe", "deepseek_v3", "gpt_oss", "gemma2", "gemma3_text", "cohere2", "bert", "opt", "whisper"),
    *("qwen3_next", "bamba", "nemotron_h", "lfm2"),  # shared by heads and halos
    *("mamba", "bloom", "falcon", "gpt_neo", "gptj", "codegen", "doge", "xlnet"),  # whole sequences in some version
)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_is_exact(on_ranks, model_type):
    found = survey.examine(on_ranks, model_type, [2], {})
    assert found.state in ("exact", "exact by resharding"), found.reason
