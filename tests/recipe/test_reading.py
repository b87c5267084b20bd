"""Tests of reading a recipe: its sections become typed objects, and mistakes are refused."""

import pytest
from accelerate import FullyShardedDataParallelPlugin

from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.model import load_config, load_reward
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.recipe.schema import DataSection, ModelSection
from tests.helpers.models import needs_sharding_while_loading
from tests.helpers.recipe import MINIMAL, RECIPES


def test_sections_become_typed_objects(minimal):
    recipe = load_recipe(
        minimal,
        [
            "context_parallel.size=2",
            "training.max_steps=3",
            "training.learning_rate=1e-4",
            "lora.r=4",
            "training.seed=7",
            "training.resume_from_checkpoint=true",
        ],
    )
    assert recipe.context_parallel.size == 2
    assert recipe.data == DataSection(path="text", max_length=128)
    assert recipe.model == ModelSection(type="qwen3", tokenizer="bytes")
    assert recipe.lora_config().r == 4 and recipe.lora_config().task_type == "CAUSAL_LM"
    arguments = recipe.training_arguments()
    assert (arguments.max_steps, arguments.learning_rate, arguments.seed) == (3, 1e-4, 7)
    assert arguments.resume_from_checkpoint is True


def test_overrides_win_and_remove(minimal):
    minimal.write_text(MINIMAL + "lora: {r: 4}\ntraining: {seed: 1, max_steps: 5}\n")
    recipe = load_recipe(minimal, ["lora=null", "training.seed=2", "model.config={hidden_size: 64}"])
    assert recipe.lora_config() is None
    assert recipe.training.model_dump(exclude_unset=True) == {"seed": 2, "max_steps": 5}
    assert recipe.model.config == {"hidden_size": 64}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.max_stepz=3", ["training.max_stepz", "'training'", "'max_steps'"]),
        ("training.max_length=3", ["training.max_length", "'training'", "'data.max_length'"]),
        ("max_steps=3", ["max_steps", "'training.max_steps'"]),
        ("trainin.max_steps=3", ["trainin", "'training'"]),
        ("context_parallel.sise=2", ["context_parallel.sise", "'context_parallel'", "'size'"]),
        ("lora.rr=2", ["lora.rr", "'lora'", "'r'"]),
        ("data.packed=true", ["data.packed", "'data'", "'packing'"]),
        ("model.confg={}", ["model.confg", "'model'", "'config'"]),
        ("model.config.hiden_size=64", ["config.hiden_size", "'hidden_size'"]),
        ("model.type=qwen33", ["'qwen33'", "'qwen3'"]),
        ("training.max_steps=three", ["training.max_steps", "integer", "'three'"]),
        ("training.seed=1.5", ["training.seed", "integer", "1.5"]),
        ("training.bf16=1", ["training.bf16", "boolean"]),
        ("context_parallel.size=0", ["context_parallel", "size=0"]),
        ("context_parallel.size=true", ["context_parallel.size", "integer"]),
        ("context_parallel.layout=zigzg", ["context_parallel", "layout='zigzg'", "'zigzag'"]),
        ("data.max_length=0", ["data.max_length", "greater than or equal to 2"]),
        ("data.path=null", ["data.path", "string"]),
        ("data.format=csv", ["data.format", "'text', 'chat' or 'tokens'"]),
        ("lora.r=[1]", ["lora.r", "integer"]),
        ("training=3", ["training", "object"]),
        ("model.tokenizer=null", ["model", "tokenizer"]),
        ("model.type=null", ["model", "'name'", "'type'"]),
        ("training.max_steps", ["'training.max_steps'", "section.key=value"]),
        ("training.seed=${nosuch:1}", ["nosuch"]),
    ],
)
def test_mistakes_are_named(minimal, override, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(minimal, [override])
    for words in said:
        assert words in str(caught.value)


def test_all_mistakes_are_listed_at_once(minimal):
    with pytest.raises(RecipeError) as caught:
        load_recipe(minimal, ["training.max_stepz=3", "data.max_length=0", "lora.r=x"])
    assert all(key in str(caught.value) for key in ("training.max_stepz", "data.max_length", "lora.r"))


@pytest.mark.parametrize(
    "override", ["training.hub_token=[hf_abc]", "training.hub_token hf_abc", "=training.hub_token=hf_abc"]
)
def test_secrets_are_not_shown(minimal, override):
    with pytest.raises(RecipeError) as refusal:
        load_recipe(minimal, [override])
    assert "hf_abc" not in str(refusal.value)


def test_splitting_attention_needs_to_be_ours(minimal):
    with pytest.raises(RecipeError, match=r"model\.attention='sdpa'.*size=2"):
        load_recipe(minimal, ["model.attention=sdpa", "context_parallel.size=2"])
    load_recipe(minimal, ["model.attention=sdpa", "context_parallel.size=1"])
    load_recipe(minimal, ["model.attention={text_config: context_parallel}", "context_parallel.size=2"])


@pytest.mark.parametrize("text", ["", "[1, 2]", "model: {", "model: 3\ndata: 4", "model: {type: qwen3}\nmodel: {}"])
def test_broken_files_are_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_yaml_cannot_run_code(tmp_path):
    trace = tmp_path / "trace"
    path = tmp_path / "evil.yaml"
    path.write_text(
        MINIMAL + f"lora: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{trace}]]\n"
    )
    with pytest.raises(RecipeError, match=r"evil\.yaml"):
        load_recipe(path)
    assert not trace.exists()


def test_values_that_transformers_and_peft_refuse(minimal):
    with pytest.raises(RecipeError, match=r"training: .*nosuch"):
        load_recipe(minimal, ["training.optim=nosuch"]).training_arguments()
    with pytest.raises(RecipeError, match=r"lora: "):
        load_recipe(minimal, ["lora.layers_pattern=layers"]).lora_config()
    with pytest.raises(RecipeError, match=r"hidden_size"):
        load_config(load_recipe(minimal, ["model.config.hidden_size=wide"]).model)


def test_the_fsdp_recipe_configures_fsdp2():
    # `use_cpu` lets the arguments be built without a GPU, which bf16 and FSDP need otherwise.
    recipe = load_recipe(RECIPES / "qwen3_8b_fsdp2.yaml", ["training.use_cpu=true"])
    arguments = recipe.training_arguments()
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and arguments.gradient_checkpointing
    assert plugin.transformer_cls_names_to_wrap == ["Qwen3DecoderLayer"]


@needs_sharding_while_loading
def test_the_sizes_of_tensor_parallelism_are_checked_before_anything_starts(minimal):
    sizes = ["distributed.tp_size=2", "distributed.fsdp_size=4"]
    recipe = load_recipe(minimal, [*sizes, "context_parallel.size=2", "context_parallel.sequence_parallel=true"])
    assert recipe.processes == 8
    assert (recipe.distributed_config().tp_size, recipe.distributed_config().fsdp_size) == (2, 4)
    for overrides, message in (
        ([*sizes, "context_parallel.size=3"], r"size=3 does not divide the 4 data ranks"),
        (["distributed.fsdp_size=2", "context_parallel.sequence_parallel=true"], r"distributed\.tp_size is 1"),
        ([*sizes, "training.fsdp=true"], r"training\.fsdp=True and 'distributed' both"),
        (["distributed.tp=2"], r"distributed\.tp: unknown key"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(minimal, overrides)
    with pytest.raises(RecipeError, match="distributed: "):
        load_recipe(minimal, ["distributed.tp_size=-1"]).distributed_config()


def test_a_trainer_of_trl_brings_its_arguments(minimal):
    recipe = load_recipe(minimal, ["trainer=dpo", "training.beta=0.2", "training.loss_type=[sigmoid]"])
    assert recipe.training.beta == 0.2
    recipe = load_recipe(minimal, ["trainer=grpo", "rewards=[tests.helpers.recipe:length]"])
    assert load_reward(recipe.rewards[0])(["abc"]) == [3.0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer=dpp"], "'dpp' is none of sft, dpo, kto, reward, grpo, rloo, orpo, cpo. "),
        (
            ["trainer=dpo", "training.betta=1"],
            "training.betta: unknown key in the section 'training'. Did you mean 'beta'",
        ),
        (["training.beta=1.0"], "training.beta: unknown key in the section 'training'."),
        (["trainer=[dpo]"], "trainer: Input should be a valid string"),
        (["trainer=grpo"], "trainer='grpo' and rewards=[] do not fit"),
        (["rewards=[a:b]"], "Add trainer: grpo"),
        (["trainer=dpo", "data.packing=true"], "data.packing=true does nothing with trainer='dpo'"),
        (["trainer=sft", "data.column=text"], "data.format and data.column are for recipes without a trainer of TRL"),
    ],
)
def test_mistakes_with_a_trainer_of_trl_are_named(minimal, overrides, said):
    with pytest.raises(RecipeError) as error:
        load_recipe(minimal, overrides)
    assert said in str(error.value)
    with pytest.raises(RecipeError, match="module:function"):
        load_reward("tests.helpers.recipe:width")
