"""Recipes: their schema, the refusal of mistakes, the rows they make, and the reports of runs."""

from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, Qwen3Config

from hf_context_parallel.integration.model_registry import known_states
from hf_context_parallel.recipe.compare import compare_with_one_process, difference
from hf_context_parallel.recipe.documents import load_documents, make_collator, pack, to_rows
from hf_context_parallel.recipe.dry_run import MAX_LENGTH, made_up_documents, shrink
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.model import add_lora, load_config, load_model, load_tokenizer
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.recipe.report import write_report
from hf_context_parallel.recipe.schema import DataSection, ModelSection
from tests.helpers.models import needs_sharding_while_loading, needs_the_tables_version

RECIPES = Path(__file__).parents[2] / "recipes"
MEGATRON = ("megatron_quick_start_cpu", "megatron_quick_start")
MINIMAL = """
model: {type: qwen3, tokenizer: bytes}
data: {path: text, max_length: 128}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def section(**changes):
    return DataSection(**{"path": "documents", "max_length": 8, **changes})


def test_sections_become_typed_objects(minimal):
    recipe = load_recipe(
        minimal,
        [
            "context_parallel.size=2",
            "training.max_steps=3",
            "training.learning_rate=1e-4",
            "lora.r=4",
            "training.seed=7",
        ],
    )
    assert recipe.context_parallel.size == 2
    assert recipe.data == DataSection(path="text", max_length=128)
    assert recipe.model == ModelSection(type="qwen3", tokenizer="bytes")
    assert recipe.lora_config().r == 4 and recipe.lora_config().task_type == "CAUSAL_LM"
    arguments = recipe.training_arguments()
    assert (arguments.max_steps, arguments.learning_rate, arguments.seed) == (3, 1e-4, 7)


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
        ("data.max_length=0", ["data.max_length", "greater than 0"]),
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
    tokenizer = load_tokenizer(small.model)
    model = load_model(small.model, tokenizer)
    assert model.num_parameters() < 1_000_000
    rows = to_rows(made_up_documents(small.data, tokenizer), small.data, tokenizer)
    batch = make_collator(small.data, tokenizer)([rows[0]])
    assert batch["input_ids"].shape == (1, MAX_LENGTH)
    assert batch["input_ids"].max() < model.config.vocab_size


def test_the_fsdp_recipe_configures_fsdp2():
    # `use_cpu` lets the arguments be built without a GPU, which bf16 and FSDP need otherwise.
    recipe = load_recipe(RECIPES / "qwen3_8b_fsdp2.yaml", ["training.use_cpu=true"])
    plugin = FullyShardedDataParallelPlugin(**recipe.training_arguments().fsdp_plugin_args)
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and plugin.activation_checkpointing
    assert plugin.transformer_cls_names_to_wrap == ["Qwen3DecoderLayer"]


def test_the_demo_reads_long_documents():
    recipe = load_recipe(RECIPES / "demo_cpu.yaml")
    rows = to_rows(load_documents(recipe.data, "train"), recipe.data, load_tokenizer(recipe.model))
    assert len(rows) >= recipe.training.max_steps
    assert {len(row) for row in rows["input_ids"]} == {16384}


def test_a_dry_run_asks_no_hub(minimal):
    recipe = load_recipe(minimal, ["model.type=null", "model.name=somebody/something"])
    with pytest.raises(RecipeError, match=r"model\.type: .*'somebody/something'"):
        shrink(recipe, 1, "unused")


HUB = "model.name=somebody/something"
EXACT = [model_type for model_type, finding in known_states().items() if finding["state"] != "refused"]
SAMPLE = ["phi3", "glm4", "llama4", "qwen3_5_moe", "emu3", "gpt2", "whisper", "ministral"]


@needs_the_tables_version
@pytest.mark.parametrize("types", [SAMPLE, pytest.param(EXACT, marks=pytest.mark.exhaustive)], ids=["some", "all"])
def test_dry_runs_are_of_tiny_models(minimal, types):
    for model_type in types:
        small, _ = shrink(load_recipe(minimal, [HUB, f"model.type={model_type}"]), 1, "unused")
        with torch.device("meta"):
            model = load_model(small.model, ByT5Tokenizer())
        text = model.config.get_text_config()
        assert model.num_parameters() < 200_000, model_type
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


def test_text_rows_are_cut_and_padded():
    tokenizer = ByT5Tokenizer()
    settings = section()
    rows = to_rows(Dataset.from_dict({"text": ["abc", "a" * 20, ""]}), settings, tokenizer)
    assert rows["input_ids"] == [[*tokenizer("abc")["input_ids"]], [100] * 8]
    assert rows["input_ids"][0][-1] == tokenizer.eos_token_id
    batch = make_collator(settings, tokenizer)([rows[0], rows[1]])
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)


def test_chat_rows_follow_the_template():
    tokenizer = ByT5Tokenizer(chat_template="{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    chats = Dataset.from_dict({"messages": [[{"role": "a", "content": "b"}, {"role": "c", "content": "d"}]]})
    rows = to_rows(chats, section(format="chat", max_length=100), tokenizer)
    assert tokenizer.decode(rows[0]["input_ids"]) == "a=b;c=d;"
    with pytest.raises(RecipeError, match="chat template"):
        to_rows(chats, section(format="chat"), ByT5Tokenizer())


def test_token_rows_keep_labels_of_their_own():
    data = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [8, 9]]})
    settings = section(format="tokens", packing=True)
    batch = make_collator(settings, None)(list(to_rows(data, settings, ByT5Tokenizer())))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert "attention_mask" not in batch


def test_streams_become_rows():
    stream = Dataset.from_dict({"text": ["abc", "defgh"], "other": [1, 2]}).to_iterable_dataset()
    rows = list(to_rows(stream, section(packing=True), ByT5Tokenizer()))
    assert [[len(document) for document in row["input_ids"]] for row in rows] == [[4, 4], [2]]


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="'text'"):
        load_documents(section(path="text", data_files=str(tmp_path / "nothing.txt")), "train")
    with pytest.raises(RecipeError, match=r"no column 'text'.*body"):
        to_rows(Dataset.from_dict({"body": ["abc"]}), section(), ByT5Tokenizer())
    with pytest.raises(RecipeError, match="no document of two tokens"):
        to_rows(Dataset.from_dict({"text": ["", ""]}), section(), ByT5Tokenizer())


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 16))
def test_packing_keeps_every_token_in_order(lengths, max_length):
    documents = [[1000 * index + position for position in range(length)] for index, length in enumerate(lengths)]
    packed = pack({"input_ids": documents, "labels": documents}, max_length)
    assert packed["input_ids"] == packed["labels"]
    rows = packed["input_ids"]
    assert [token for row in rows for piece in row for token in piece] == [
        t for document in documents for t in document
    ]
    sizes = [sum(map(len, row)) for row in rows]
    assert all(size == max_length for size in sizes[:-1]) and all(0 < size <= max_length for size in sizes[-1:])
    # A piece belongs to one document, and documents are cut at the ends of rows only.
    assert all(piece == list(range(piece[0], piece[0] + len(piece))) for row in rows for piece in row)
    assert sum(map(len, rows)) <= len(documents) + max(len(rows) - 1, 0)


def test_the_report_has_a_table_and_curves(tmp_path):
    history = [
        {"step": 1, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 100.0, "peak_memory_gib": 0.5},
        {"step": 2, "loss": 1.5, "learning_rate": 1e-3, "tokens_per_second": 300.0, "peak_memory_gib": 0.75},
        {"step": 2, "eval_loss": 1.25},
        {"step": 2, "train_runtime": 3.0},
    ]
    text = write_report(tmp_path / "new", "Run of a recipe", history).read_text()
    assert "2 steps; loss 2.5000 at the first log line and 1.5000 at the last; 200 tokens/s (median)" in text
    assert "at most 0.75 GiB a rank" in text
    assert text.count("\n|") == 5  # a heading, a rule and three steps
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_compare_is_refused():
    with pytest.raises(RecipeError, match=r"size=1 leaves nothing to compare"):
        compare_with_one_process(RECIPES / "demo_cpu.yaml", ["context_parallel.size=1"])


def test_a_loss_that_is_no_number_differs():
    assert difference(2.0, 2.0) == 0
    assert difference(2.0002, 2.0) == pytest.approx(1e-4)
    assert difference(float("nan"), 2.0) == difference(2.0, float("nan")) == float("inf")


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


def test_megatrons_quick_start_is_tp_4_by_cp_2_and_stays_so_in_a_dry_run(tmp_path):
    for name in MEGATRON:
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        assert (recipe.processes, recipe.distributed.tp_size, recipe.context_parallel.size) == (8, 4, 2)
        assert recipe.context_parallel.sequence_parallel and recipe.data.max_length == 8192
        small, _ = shrink(recipe, 8, str(tmp_path))
        assert small.distributed.tp_size == 4 and small.context_parallel == recipe.context_parallel
        assert small.model.config["num_key_value_heads"] == 4
