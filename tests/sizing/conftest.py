"""Models of the tests of plans: configurations on disk, without weights."""

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig


@pytest.fixture
def llama_8b(tmp_path):
    """Folder with the configuration of Llama 3.1 8B."""
    folder = tmp_path / "llama"
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def small_moe():
    """Configuration of a mixture of experts, with 2 of 8 experts for a token."""
    return Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=64,
        moe_intermediate_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    )
