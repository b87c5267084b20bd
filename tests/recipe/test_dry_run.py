"""Tests of dry runs: each recipe becomes a tiny one of the same kind."""

import pytest
import torch
from transformers import ByT5Tokenizer, Qwen3Config

from hf_context_parallel.compat import causal_lm_classes
from hf_context_parallel.integration.model_registry import known_states
from hf_context_parallel.recipe.documents import make_collator, to_rows
from hf_context_parallel.recipe.dry_run import MAX_LENGTH, made_up_documents, shrink
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.images import ImageCollator, to_image_documents
from hf_context_parallel.recipe.model import load_config, load_model, load_tokenizer
from hf_context_parallel.recipe.processor import load_processor
from hf_context_parallel.recipe.reading import load_recipe
from tests.helpers.models import needs_sharding_while_loading, needs_the_tables_version
from tests.helpers.recipe import MEGATRON, RECIPES

HUB = "model.name=somebody/something"
EXACT = [
    model_type
    for model_type, finding in known_states().items()
    if finding["state"] != "refused" and model_type in causal_lm_classes()
]
SAMPLE = ["phi3", "glm4", "llama4", "qwen3_5_moe", "emu3", "gpt2", "whisper", "ministral", "dots3_note_text"]
SHARDED = {"demo_experts_cpu", "demo_hsdp_cpu"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_sharding_while_loading) if name in SHARDED else name
        for name in sorted(path.stem for path in RECIPES.glob("*.yaml"))
    ],
)
def test_shipped_recipes_load_and_shrink(name, tmp_path):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert not recipe.model.trust_remote_code
    small, replaced = shrink(recipe, 1, str(tmp_path))
    assert small.context_parallel.size == 1
    assert len(replaced) == 5 + bool(recipe.distributed)
    has_images = small.data.images is not None
    tokenizer = load_tokenizer(small.model)
    model = load_model(small.model, tokenizer, is_image_text=has_images)
    assert model.num_parameters() < 1_000_000
    documents = made_up_documents(small.data, tokenizer)
    if has_images:
        rows = to_image_documents(documents, small.data)
        batch = ImageCollator(small.data, load_processor(small.model))([rows[0]])
        assert batch["pixel_values"].isfinite().all()
    else:
        rows = to_rows(documents, small.data, tokenizer)
        batch = make_collator(small.data, tokenizer)([rows[0]])
    assert batch["input_ids"].shape == (1, MAX_LENGTH)
    assert batch["input_ids"].max() < model.config.get_text_config().vocab_size


def test_a_type_without_a_causal_language_model_is_refused(minimal):
    recipe = load_recipe(minimal, ["model.type=modernbert"])
    with pytest.raises(RecipeError, match=r"'modernbert' has no causal language model.*Name a type"):
        load_model(recipe.model, ByT5Tokenizer())


def test_a_dry_run_asks_no_hub(minimal):
    recipe = load_recipe(minimal, ["model.type=null", HUB])
    with pytest.raises(RecipeError, match=r"model\.type: .*'somebody/something'"):
        shrink(recipe, 1, "unused")


@needs_the_tables_version
@pytest.mark.parametrize("types", [SAMPLE, pytest.param(EXACT, marks=pytest.mark.exhaustive)], ids=["some", "all"])
def test_dry_runs_are_of_tiny_models(minimal, types):
    for model_type in types:
        small, _ = shrink(load_recipe(minimal, [HUB, f"model.type={model_type}"]), 1, "unused")
        with torch.device("meta"):
            model = load_model(small.model, ByT5Tokenizer())
        text = model.config.get_text_config()
        assert model.num_parameters() < 500_000, model_type
        assert text.vocab_size == len(ByT5Tokenizer()), model_type
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            assert (getattr(text, token, None) or 0) < text.vocab_size, model_type


def test_a_dry_run_takes_every_value_that_is_no_size(minimal):
    rope = "{rope_type: yarn, rope_theta: 5e5, factor: 4.0, original_max_position_embeddings: 32768}"
    layers = "[full_attention, full_attention, sliding_attention]"
    values = f"{{num_hidden_layers: 3, layer_types: {layers}, sliding_window: 4096, use_sliding_window: true, "
    values += f"tie_word_embeddings: true, attention_dropout: 0.25, hidden_act: gelu, rope_parameters: {rope}}}"
    small, _ = shrink(load_recipe(minimal, [f"model.config={values}"]), 1, "unused")
    config = load_config(small.model)
    assert config.tie_word_embeddings and config.attention_dropout == 0.25 and config.hidden_act == "gelu"
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 4
    assert config.layer_types == ["full_attention", "sliding_attention"] and config.sliding_window < MAX_LENGTH


def test_a_dry_run_keeps_the_ways_to_communicate_of_the_layers_it_keeps(minimal):
    ways = ["p2p", "a2a", "all_gather"] * 2
    recipe = load_recipe(minimal, ["model.config={num_hidden_layers: 6}", f"context_parallel.comm_type={ways}"])
    small, _ = shrink(recipe, 1, "unused")
    layers = load_config(small.model).num_hidden_layers
    assert 0 < layers < 6 and list(small.context_parallel.comm_type) == ways[:layers]


def test_a_dry_run_of_phi3_computes_a_loss(minimal):
    """Run a small phi3, whose default padding token, 32000, is outside of its vocabulary."""
    recipe = load_recipe(minimal, ["model.type=phi3"])
    small, replaced = shrink(recipe, 1, "unused")
    assert replaced[0] == "model: a tiny phi3 with random weights, for phi3"
    tokenizer = load_tokenizer(small.model)
    rows = to_rows(made_up_documents(small.data, tokenizer), small.data, tokenizer)
    loss = load_model(small.model, tokenizer)(**make_collator(small.data, tokenizer)([rows[0]])).loss
    assert loss.isfinite()


def test_a_dry_run_reads_a_folders_configuration(minimal, tmp_path):
    Qwen3Config(num_hidden_layers=3, rope_parameters={"rope_type": "default", "rope_theta": 7.0}).save_pretrained(
        tmp_path
    )
    folder = [f"model.name={tmp_path}", "model.type=null"]
    small, _ = shrink(load_recipe(minimal, folder), 1, "unused")
    assert small.model.type == "qwen3" and small.model.config["rope_parameters"]["rope_theta"] == 7
    with pytest.raises(RecipeError, match="has no hiden_size"):
        shrink(load_recipe(minimal, [*folder, "model.config={hiden_size: 64}"]), 1, "unused")


@needs_sharding_while_loading
def test_ranks_divide_the_heads_and_experts_of_a_dry_run(minimal):
    for model_type, sizes in (("glm4", {"tp_size": 4}), ("llama", {"tp_size": 8}), ("gemma3", {"tp_size": 3})):
        recipe = load_recipe(minimal, [HUB, f"model.type={model_type}", f"distributed={sizes}".replace("'", "")])
        config = load_config(shrink(recipe, recipe.processes, "unused")[0].model).get_text_config()
        for heads in (config.num_attention_heads, config.num_key_value_heads):
            assert heads % sizes["tp_size"] == 0
        assert config.num_attention_heads % config.num_key_value_heads == 0
    recipe = load_recipe(minimal, ["model.type=qwen3_moe", "distributed={fsdp_size: 16, ep_size: 8}"])
    assert load_config(shrink(recipe, 16, "unused")[0].model).num_experts == 8
    assert load_config(shrink(recipe, 1, "unused")[0].model).num_experts == 4


def test_megatrons_quick_start_is_tp_4_by_cp_2_and_stays_so_in_a_dry_run(tmp_path):
    for name in MEGATRON:
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        assert (recipe.processes, recipe.distributed.tp_size, recipe.context_parallel.size) == (8, 4, 2)
        assert recipe.context_parallel.sequence_parallel and recipe.data.max_length == 8192
        small, _ = shrink(recipe, 8, str(tmp_path))
        assert small.distributed.tp_size == 4 and small.context_parallel == recipe.context_parallel
        assert small.model.config["num_key_value_heads"] == 4
