"""Command `plan`, run in this process, offline."""

import re

import pytest
from omegaconf import OmegaConf
from transformers import Gemma3Config, MambaConfig, Qwen2_5_VLConfig, ViTConfig
from typer.testing import CliRunner

from hf_context_parallel.cli import app
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.reading import load_recipe
from tests.helpers.recipe import MINIMAL


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def printed(*arguments):
    result = plan(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert max(len(line) for line in result.output.splitlines() if "/pytest-" not in line) <= 118
    return result.output


def mistake(*arguments):
    result = plan(*arguments)
    assert isinstance(result.exception, RecipeError)
    return str(result.exception)


ON_8 = ("--gpus", 8, "--gpu", "h100-80gb")


def test_meshes_with_their_parts_links_and_assumptions(llama_8b):
    output = printed("--model", llama_8b, "--seq-len", 131072, *ON_8)
    assert f"{llama_8b}: 8.03 B parameters in float32, all trained, on 8 x h100-80gb" in output.replace("\n", " ")
    rows = re.findall(r"^ *\d+ +(\d) +(\d) +(?:-|\S+) +\d+ +\d+ +(?:off|device|host) ", output, re.MULTILINE)
    assert len(rows) == len(set(rows)) == 10
    assert "Memory of a rank at its peak, GiB:" in output
    for part in ("weights", "gradients", "optimizer", "attention", "layer", "k/v", "loss"):
        assert part in output
    assert "working set of a layer" in output
    assert "FSDP: weights, gradients" in output
    assert "NVIDIA's data sheet of the H100 (SXM)" in output
    assert re.search(r"At [\d,]+ tokens the 73.6 GiB that tensors can take are full", output)
    assert re.search(r"A step of [\d,]+ tokens takes [\d.]+ s:", output)


def test_all_plans_are_listed_on_request(llama_8b):
    few = printed("--model", llama_8b, "--seq-len", 32768, "--lora", 16, *ON_8)
    every = printed("--model", llama_8b, "--seq-len", 32768, "--lora", 16, "--all", *ON_8)
    counted = int(re.search(r"of (\d+) plans that fit", few).group(1))
    assert re.search(rf"^ *{counted} ", every, re.MULTILINE)
    assert "LoRA trains 42 M" in " ".join(few.split())


def test_a_configuration_file_is_enough(llama_8b):
    assert "TP" in printed("--model", llama_8b / "config.json", "--seq-len", 8192, *ON_8)


def test_what_does_not_fit_is_named_with_its_largest_part(llama_8b):
    result = plan("--model", llama_8b, "--seq-len", 8192, "--gpus", 1, "--gpu", "h100")
    assert result.exit_code == 1
    assert re.search(r"TP 1 x CP 1 does not fit: the least is [\d.]+ GiB of 73.6, of which [\d.]+ are", result.output)
    assert "Nothing fits. Take more GPUs" in result.output


def test_longest(llama_8b):
    output = printed("--model", llama_8b, "--longest", "--lora", 16, *ON_8)
    lengths = [
        int(found.replace(",", "")) for found in re.findall(r"(?:device|host) +(?:-|\d+) +([\d,]{6,}) ", output)
    ]
    assert lengths and lengths == sorted(lengths, reverse=True)
    assert "ends by" in output
    assert "131,072 positions. Beyond them it needs another RoPE scaling." in output


def test_the_table_of_megatron(llama_8b):
    output = printed("--model", llama_8b, "--gpu", "h100", "--megatron-table")
    for mesh, length, published in (
        ("8 x CP 1", "2,048", 180),
        ("4 x CP 2", "4,096", 165),
        ("2 x CP 4", "8,192", 140),
    ):
        assert re.search(rf"TP {mesh} +{length} +{published} +\d+ +[\d,]+ ", output)
    assert "estimates of this command, not measurements" in output.replace("\n", " ")


def test_a_model_without_a_plan_is_named(tmp_path):
    MambaConfig().save_pretrained(tmp_path)
    assert "'mamba' has no plan: its memory is not known" in mistake("--model", tmp_path, "--seq-len", 1024, *ON_8)


def test_a_model_with_a_vision_tower(tmp_path):
    Qwen2_5_VLConfig().save_pretrained(tmp_path)
    asked = ("--model", tmp_path, "--seq-len", 1024, "--lora", 8, "--gpus", 8, "--gpu", "b200")
    every, none = printed(*asked), printed(*asked, "--image-share", 0)
    said = " ".join(every.split())
    assert "100% of the tokens count as those of images, which are 4,096 patches of a sequence" in said
    assert "The vision tower is frozen." in said and "gradients run through the frozen tower" in said
    assert "images: pixels, the vision tower, features" in said and "vision tower" in said
    assert "patches of a sequence" not in none and "images: pixels" not in none
    half = " ".join(printed(*asked, "--image-share", 0.5).split())
    assert "50% of the tokens count as those of images, which are 2,048 patches" in half


def test_a_composite_model_without_images(tmp_path, llama_8b):
    Gemma3Config().save_pretrained(tmp_path)
    assert "B parameters" in printed("--model", tmp_path, "--seq-len", 1024, "--image-share", 0, *ON_8)
    assert "--image-share=0.5: 'llama' has no vision tower" in mistake(
        "--model", llama_8b, "--seq-len", 1024, "--image-share", 0.5, *ON_8
    )


def test_a_type_without_a_language_model_is_named(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    message = "Transformers has no language model of type 'vit'. Give a model that it has."
    assert message in mistake("--model", tmp_path, "--seq-len", 1024, *ON_8)


def test_a_model_of_the_hub_that_cannot_be_read():
    assert "no configuration for 'somebody/something'" in mistake(
        "--model", "somebody/something", "--seq-len", 1024, *ON_8
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--seq-len", 1024, *ON_8), "RECIPE and --model are both given or both missing"),
        (("--model", "MODEL", *ON_8), "--seq-len is missing"),
        (("--model", "MODEL", "--seq-len", 1024, "--gpu", "tpu"), "--gpu='tpu' is not one of a100-40gb"),
        (("--model", "MODEL", "--seq-len", 1024), "--gpu is missing"),
        (("--model", "MODEL", "--seq-len", 1024, "--weights", "int4", *ON_8), "--weights='int4' is not one of"),
        (("--model", "MODEL", "--seq-len", 1024, "--tokens-per-batch", 9, *ON_8), "--tokens-per-batch=9 is less than"),
        (("--model", "MODEL", "--megatron-table", "--longest", *ON_8), "--megatron-table prints one table"),
    ],
)
def test_mistakes_are_named(llama_8b, monkeypatch, arguments, message):
    monkeypatch.setattr("hf_context_parallel.sizing.command.gpu_here", lambda: None)
    assert message in mistake(*(llama_8b if part == "MODEL" else part for part in arguments))


def test_the_recipe_of_a_plan_is_valid(llama_8b, tmp_path):
    path = tmp_path / "planned.yaml"
    output = printed(
        "--model", llama_8b, "--seq-len", 131072, "--tokens-per-batch", 524288, "--lora", 8, "--write", path, *ON_8
    )
    assert f"Recipe of the first plan: {path}" in output.replace("\n", " ")
    recipe = load_recipe(path)
    assert (recipe.model.name, recipe.model.type) == (str(llama_8b), "llama")
    assert recipe.data.max_length == 131072
    assert recipe.lora_config().r == 8
    ranks = recipe.processes
    assert f"--num_processes {ranks}" in path.read_text()
    groups = ranks // recipe.tensor_ranks // recipe.context_parallel.size
    assert groups * recipe.training.gradient_accumulation_steps * 131072 == 524288
    assert recipe.training.gradient_checkpointing
    assert "is there already" in mistake("--model", llama_8b, "--seq-len", 4096, "--write", path, *ON_8)


def test_a_recipe_in_place_of_a_model(llama_8b, tmp_path):
    given, path = tmp_path / "given.yaml", tmp_path / "planned.yaml"
    given.write_text(
        f"""
model: {{name: {llama_8b}, dtype: bfloat16}}
context_parallel: {{size: 4, kernel: torch, a2a_size: 2, comm_type: a2a+p2p}}
distributed: {{tp_size: 2, fsdp_size: 4}}
data: {{path: text, max_length: 65536}}
training:
  output_dir: output/x
  learning_rate: 1e-4
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 4
  gradient_checkpointing: true
lora: {{r: 4, target_modules: [q_proj]}}
"""
    )
    output = printed(given, "--gpu", "h100", "--write", path)
    assert "on 8 x h100-80gb" in output.replace("\n", " ")
    assert "1 x 65,536 tokens at a time, 262,144 tokens a step" in output
    assert "Note: lora.target_modules=['q_proj']: counted as all-linear." in output
    recipe = load_recipe(path)
    assert recipe.training.learning_rate == 1e-4
    assert recipe.context_parallel.kernel == "torch"
    assert recipe.training.gradient_checkpointing
    written = OmegaConf.load(path)
    size = recipe.context_parallel.size
    assert written.training.gradient_accumulation_steps * 8 // recipe.tensor_ranks // size == 4
    assert (written.context_parallel.get("a2a_size") is None) == (recipe.context_parallel.comm_type != "a2a+p2p")


def test_adapters_have_no_tensor_parallelism(llama_8b):
    output = printed("--model", llama_8b, "--seq-len", 8192, "--lora", 16, *ON_8)
    assert {int(tp) for tp in re.findall(r"^ *\d+ +(\d) +\d ", output, re.MULTILINE)} == {1}
    assert "so no mesh has it" in output


def test_a_recipe_with_quantised_weights(llama_8b, tmp_path):
    given = tmp_path / "given.yaml"
    given.write_text(
        f"""
model: {{name: {llama_8b}, dtype: bfloat16, quantization: {{load_in_4bit: true}}}}
context_parallel: {{size: 2}}
data: {{path: text, max_length: 32768}}
training: {{output_dir: output/x, per_device_train_batch_size: 1}}
lora: {{r: 4, target_modules: all-linear}}
"""
    )
    output = printed(given, "--gpu", "rtx4090").replace("\n", " ")
    assert "6.98 B parameters are frozen in 4.5 bits, and each GPU holds them whole" in output
    assert "weights whole" in output and "FSDP over" not in output


def test_options_come_before_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    output = printed(path, "--gpus", 2, "--gpu", "a100-80gb", "--seq-len", 4096, "--rows", 2, "--lora", 3)
    assert "on 2 x a100-80gb" in output.replace("\n", " ")
    assert "2 x 4,096 tokens at a time" in output


def test_types_that_tensor_parallelism_does_not_shard(tmp_path, small_moe):
    small_moe.save_pretrained(tmp_path / "moe")
    refused = type(small_moe).model_type
    from hf_context_parallel.sizing import command

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_may_shard", lambda config: False)
        output = printed("--model", tmp_path / "moe", "--seq-len", 4096, *ON_8)
    assert f"tensor parallelism has not been found exact for '{refused}'" in output
    assert not re.search(r"^ *\d+ +[248] +\d", output, re.MULTILINE)
