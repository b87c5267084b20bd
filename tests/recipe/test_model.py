"""Tests of the models of recipes, and of their adapters."""

import pytest
import torch
from transformers import ByT5Tokenizer, Qwen3Config

from hf_context_parallel.recipe.dry_run import shrink
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.model import add_lora, load_config, load_model
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.recipe.schema import ModelSection


def test_a_folder_of_another_type_is_refused(tmp_path):
    Qwen3Config(num_hidden_layers=1).save_pretrained(tmp_path)
    assert load_config(ModelSection(name=str(tmp_path), config={"num_hidden_layers": 3})).num_hidden_layers == 3
    with pytest.raises(RecipeError, match=r"is 'qwen3'.*says 'llama'"):
        load_config(ModelSection(name=str(tmp_path), type="llama"))
    with pytest.raises(RecipeError, match=r"has no hiden_size"):
        load_config(ModelSection(name=str(tmp_path), config={"hiden_size": 3}))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    tokenizer = ByT5Tokenizer()
    small = ModelSection(type="qwen3", tokenizer="bytes", config={"vocab_size": 300})
    with pytest.raises(RecipeError, match=r"vocab_size=300.*384"):
        load_model(small, tokenizer)


def test_a_quantised_model_is_trained_by_its_adapters(minimal):
    bits = "{load_in_4bit: true, bnb_4bit_quant_type: nf4}"
    recipe = load_recipe(minimal, [f"model.quantization={bits}", "lora.target_modules=all-linear"])
    small, _ = shrink(recipe, 1, "unused")
    model = add_lora(load_model(small.model, ByT5Tokenizer()), recipe.lora_config())
    quantised = [weight for weight in model.parameters() if weight.dtype == torch.uint8]
    assert len(quantised) == 7 * model.config.num_hidden_layers
    tokens = torch.arange(9)[None]
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all((weight.grad is not None) == ("lora" in name) for name, weight in model.named_parameters())


def test_wrong_quantizations_are_refused(minimal):
    for value, message in (
        ("{quant_method: gptq}", "'gptq' is none of bitsandbytes, mxfp4"),
        ("{load_in_4bits: true}", "quantization.load_in_4bits.*load_in_4bit"),
        ("{quant_method: mxfp4, load_in_4bit: true}", "quantization.load_in_4bit' for 'mxfp4'"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(minimal, [f"model.quantization={value}"])
    wrong = load_recipe(minimal, ["model.quantization={load_in_4bit: 3}"])
    with pytest.raises(RecipeError, match=r"model\.quantization: "):
        wrong.model.quantization_config()


def test_lora_is_added_where_the_recipe_says(minimal):
    sizes = "{vocab_size: 384, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}"
    recipe = load_recipe(minimal, [f"model.config={sizes}", "lora.target_modules=[q_proj]"])
    model = load_model(recipe.model, ByT5Tokenizer())
    with pytest.raises(RecipeError, match=r"lora: .*query"):
        add_lora(model, load_recipe(minimal, ["lora.target_modules=[query]"]).lora_config())
    trained = [
        name for name, weight in add_lora(model, recipe.lora_config()).named_parameters() if weight.requires_grad
    ]
    assert len(trained) == 2 and all("q_proj" in name for name in trained)
