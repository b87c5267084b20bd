"""Predictions in the headers of recipes: what the planner says of the published sizes of their models."""

import re

import pytest
from transformers import AutoConfig

from hf_context_parallel.memory.advice import gib
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.sizing.command import Asked, _question, _with_recipe
from hf_context_parallel.sizing.meshes import Mesh
from hf_context_parallel.sizing.plans import Plan
from hf_context_parallel.sizing.speed import Choice
from hf_context_parallel.sizing.table import described
from tests.helpers.recipe import RECIPES

LLAMA_8B = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "image_size": 896,
}
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8}
SIZES = {
    "deepseek_v2_lite_128k": {
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
    },
    "gemma3_12b_128k": {
        "text_config": {
            "vocab_size": 262208,
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "sliding_window": 1024,
        },
        "vision_config": SIGLIP,
    },
    "gemma3_vlm": {
        "text_config": {
            "vocab_size": 262208,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "sliding_window": 1024,
        },
        "vision_config": SIGLIP,
    },
    "gpt_oss_20b_lora_128k": {"num_hidden_layers": 24, "num_local_experts": 32},
    "llama3_3b_pretrain_packed": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama3_8b_1m_two_nodes": LLAMA_8B,
    "llama3_8b_lora_128k": LLAMA_8B,
    "qwen3_5_9b_256k": {},
    "qwen3_5_video": {"vision_config": {"out_hidden_size": 4096}},
    "qwen3_8b_1m": QWEN3_8B,
    "qwen3_8b_fsdp2": QWEN3_8B,
    "qwen3_8b_qlora_64k": QWEN3_8B,
    "qwen3_vl_8b_lora_pages_128k": {
        "text_config": {**QWEN3_8B, "num_attention_heads": 32},
        "vision_config": {"out_hidden_size": 4096},
    },
}
"""Sizes of the models of recipes that differ from the defaults of their types, by the recipe."""
COMMAND = r"plan recipes/(\w+)\.yaml --gpu (\w+)(?: --gpus (\d+))? --all`"


def planned(name: str, gpu: str, gpus: int | None) -> Plan:
    """Make the plan of a recipe as it is."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    asked, _ = _with_recipe(Asked(gpus=gpus, gpu=gpu), recipe)
    question, _ = _question(asked, AutoConfig.for_model(recipe.model.type, **SIZES[name]), any_length=False)
    cp = recipe.context_parallel
    fsdp = question.gpus if recipe.training.fsdp else 1
    strategy = "p2p" if cp.comm_type == "auto" else cp.comm_type
    kept = "device" if cp.attention_checkpoints == "auto" else cp.attention_checkpoints
    offload = recipe.training.gradient_checkpointing_kwargs.get("offload", False)
    mesh = Mesh(1, cp.size, fsdp, question.gpus // fsdp, strategy, cp.a2a_size or 1)
    return Plan(question, mesh, Choice(kept, offload, cp.tile_tokens))


@pytest.mark.parametrize("name", sorted(SIZES))
def test_headers_say_what_the_planner_predicts(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    header = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    recipe, gpu, gpus = re.search(COMMAND, header).groups()
    assert recipe == name
    plan = planned(name, gpu, int(gpus) if gpus else None)
    assert plan.fits and plan.mesh in set(plan.question.meshes())
    assert (
        f"{described(plan)}: {gib(plan.parts.total)} GiB a GPU, {plan.step.seconds:.1f} s a step of "
        f"{plan.question.tokens:,} tokens, {plan.step.tokens_per_second:,.0f} tokens/s." in header
    )
    row = next(line for line in (RECIPES / "README.md").read_text().splitlines() if f"]({name}.yaml)" in line)
    assert f"| {gib(plan.parts.total)} GiB |" in row


def test_every_header_says_what_is_needed_and_how_to_override():
    listed = (RECIPES / "README.md").read_text()
    for path in RECIPES.glob("*.yaml"):
        assert f"]({path.name})" in listed, path.name
    for name in SIZES:
        header = (RECIPES / f"{name}.yaml").read_text().split("\nmodel:")[0]
        words = header.replace("\n# ", " ")
        for part in (
            "Needs: ",
            "Predicted by",
            "not measured",
            "override those in it",
            "--dry-run",
            "accelerate launch",
        ):
            assert part in words, (name, part)
        assert max(map(len, header.splitlines())) <= 119, name
