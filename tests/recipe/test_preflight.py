"""Mistakes that are known from a recipe and from the files it names: refused before a process starts."""

import json

import pytest

from hf_context_parallel.recipe import launch
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.files import check_files
from hf_context_parallel.recipe.preflight import check_recipe
from hf_context_parallel.recipe.reading import load_recipe
from tests.helpers.recipe import RECIPES

TINY = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
RECIPE = """
model: {type: qwen3, tokenizer: bytes, config: {vocab_size: 384, num_hidden_layers: 4}}
data: {path: json, data_files: FOLDER/data.jsonl, max_length: 128}
training: {output_dir: FOLDER/out, use_cpu: true}
context_parallel: {size: 2}
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose data are two documents, and the path of its file."""
    (tmp_path / "data.jsonl").write_text('{"text": "one text"}\n{"text": "another text"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(tmp_path)))
    return path


def refusal(path, *overrides, processes=2):
    """Check a recipe as the command does, and return the text of its error."""
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe(path, overrides), processes)
    return str(caught.value)


def test_a_good_recipe_passes(recipe):
    check_recipe(load_recipe(recipe), 2)
    check_recipe(load_recipe(recipe), 4)
    check_recipe(load_recipe(recipe, ["data.data_files=nowhere"]), 1, dry_run=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*_cpu.yaml")))
def test_shipped_recipes_pass(name, tmp_path):
    loaded = load_recipe(RECIPES / f"{name}.yaml", [f"training.output_dir={tmp_path}", "training.deepspeed=null"])
    check_recipe(loaded, loaded.processes)


CONTENTS = {
    "data.jsonl is empty. Fill it": "",
    "line 2 of {file} is malformed JSON (Expecting value at column 10)": '{"text": "a"}\n{"text": oops}\n',
    "line 2 of {file} has a null in place of a text in the column 'text'": '{"text": "a"}\n{"text": null}\n',
    "line 1 of {file} has 5 (int) in place of a text": '{"text": 5}\n',
    "no column 'text' in line 2 of {file}. Name one of body": '{"text": "a"}\n{"body": "a"}\n',
    "line 1 of {file} is no object": '"text"\n',
    "entry 2 of {file} has a null in place of a text": '[{"text": "a"},\n{"text": null}]',
    "line 2 of {file} is not utf-8": b'{"text": "a"}\n{"text": "caf\xe9"}\n',
}


@pytest.mark.parametrize("said", CONTENTS)
def test_malformed_files_are_named_with_the_line(recipe, said):
    content, file = CONTENTS[said], recipe.parent / "data.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said.format(file=file) in refusal(recipe)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [1.5, 2.0]}, "has 1.5 (float) among its integers in the column 'input_ids'"),
        ({"input_ids": ["1"]}, "has '1' (str) among its integers"),
        ({"input_ids": [True, 1]}, "has True (bool) among its integers"),
        ({"input_ids": [3, -1]}, "has the negative id -1"),
        ({"input_ids": "abc"}, "has 'abc' (str) in place of a list of token ids"),
        ({"input_ids": [1, 2], "labels": [1, 2.5]}, "has 2.5 (float) among its integers in the column 'labels'"),
    ],
)
def test_ids_that_are_none_are_refused(recipe, row, said):
    (recipe.parent / "data.jsonl").write_text(json.dumps(row))
    assert said in refusal(recipe, "data.format=tokens")


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_completions_are_counted_over_all_processes(recipe, trainer):
    (recipe.parent / "data.jsonl").write_text('{"prompt": "a"}')
    arguments = [f"trainer={trainer}", "rewards=[a:b]", "training.per_device_train_batch_size=1"]
    arguments += ["training.num_generations=2", "training.gradient_accumulation_steps=1"]
    check_recipe(load_recipe(recipe, arguments), 2)
    said = refusal(recipe, *arguments, "context_parallel.size=1", processes=1)
    assert "must be divisible by num_generations" in said


def test_labels_are_as_many_as_ids(recipe):
    (recipe.parent / "data.jsonl").write_text('{"input_ids": [1, 2, 3], "labels": [1, 2]}')
    for how in ("data.format=tokens", "trainer=sft"):
        assert "data.jsonl has 3 input_ids and 2 labels. Give each token a label" in refusal(recipe, how)


@pytest.mark.parametrize(
    ("trainer", "row", "said"),
    [
        ("sft", {"body": "a"}, "has the columns body, and trainer='sft' needs messages or conversations or text"),
        ("sft", {"text": None}, "line 2 of {file} has a null in the column 'text'"),
        ("sft", {"text": 5}, "line 2 of {file} has 5 (int) in place of a text in the column 'text'"),
        ("sft", {"messages": [{"content": "a"}]}, "has message 1, {{'content': 'a'}} (dict), without a role"),
        ("sft", {"input_ids": [1.5]}, "has 1.5 (float) among its integers in the column 'input_ids'"),
        ("sft", {"input_ids": [1], "labels": ["1"]}, "has '1' (str) among its integers in the column 'labels'"),
        ("dpo", {"chosen": "a", "rejected": 3}, "has 3 (int) in place of a text in the column 'rejected'"),
        ("kto", {"prompt": "a"}, "trainer='kto' needs completion or chosen"),
        ("grpo", {"prompt": ["a"]}, "has message 1, 'a' (str), without a role in the column 'prompt'"),
    ],
)
def test_documents_of_trl_are_looked_at(recipe, trainer, row, said):
    good = {"sft": {"text": "a"}, "dpo": {"chosen": "a", "rejected": "b"}, "kto": {"completion": "a"}}
    file = recipe.parent / "data.jsonl"
    file.write_text("\n".join(json.dumps(x) for x in (good.get(trainer, {"prompt": "a"}), row)))
    rewards = ["rewards=[a:b]"] if trainer == "grpo" else []
    assert said.format(file=file) in refusal(recipe, f"trainer={trainer}", *rewards)


@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        (["trainer=sft"], {"conversations": [{"from": "user", "value": "a"}]}),
        (["trainer=sft"], {"messages": [{"role": "user", "content": "a"}], "text": None}),
        (["trainer=sft"], {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}),
        (["trainer=sft", "training.dataset_text_field=body"], {"body": "a"}),
        (["trainer=sft"], {"messages": [{"role": "user", "content": "a"}], "text": 5, "completion": 1}),
        (["trainer=kto"], {"prompt": "a", "chosen": "b", "rejected": "c"}),
        (["trainer=dpo"], {"chosen": "b", "rejected": "c", "completion": 5, "input_ids": "unread"}),
    ],
)
def test_columns_that_trl_reads_pass(recipe, overrides, row):
    (recipe.parent / "data.jsonl").write_text(json.dumps(row))
    check_recipe(load_recipe(recipe, overrides), 2)


def test_chats_need_roles(recipe):
    (recipe.parent / "data.jsonl").write_text('{"messages": [{"content": "a"}]}')
    assert "has message 1, {'content': 'a'} (dict), without a role" in refusal(recipe, "data.format=chat")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.data_files=FOLDER/nothing*.jsonl"], "no file matches 'FOLDER/nothing*.jsonl'"),
        (["data.data_files=FOLDER"], "'FOLDER' is a folder"),
        (["data.data_files=null"], "data.data_files: it is missing, and data.path='json' needs it"),
        (["data.data_files=[]"], "names no file for the split 'train'"),
        (["data.path=FOLDER/data.jsonl"], "is a file. Name its format there, such as json"),
        (["data.path=./nowhere"], "there is no folder './nowhere'"),
        (["data.data_dir=FOLDER/nowhere"], "data.data_dir: there is no folder"),
        (["data.path=parquet"], "is no Parquet file"),
        (["data.path=csv"], "no column 'text' in FOLDER/data.jsonl"),
        (["data.path=text", "data.column=body"], "no column 'body' in FOLDER/data.jsonl. Name one of text"),
        (["data.options={sample_by: document}"], "'sample_by' is no option of data.path='json'"),
        (["data.split=test"], "data.split: there is no split 'test', only train"),
        (["data.eval_split=test"], "data.eval_split: there is no split 'test', only train"),
        (["trainer=dpo"], "has the columns text, and trainer='dpo' needs chosen"),
    ],
)
def test_data_that_is_not_there_is_refused(recipe, overrides, said):
    folder = str(recipe.parent)
    found = refusal(recipe, *(text.replace("FOLDER", folder) for text in overrides))
    assert said.replace("FOLDER", folder) in found


def test_text_that_is_not_utf_8_is_named_with_its_line(recipe):
    file = recipe.parent / "text.txt"
    file.write_bytes(b"one\ntwo\ncaf\xe9\n")
    overrides = ["data.path=text", f"data.data_files={file}"]
    assert f"line 3 of {file} is not utf-8" in refusal(recipe, *overrides)
    check_recipe(load_recipe(recipe, [*overrides, "data.options={encoding: latin-1}"]), 2)


def test_a_split_may_be_a_part_of_a_split(recipe):
    files = f"data.data_files={{train: {recipe.parent}/data.jsonl, test: {recipe.parent}/data.jsonl}}"
    check_files(load_recipe(recipe, [files, "data.split=train[:50%]", "data.eval_split=test+train[5:]"]).data)
    with pytest.raises(RecipeError, match=r"no split 'tests', only train, test\. Did you mean 'test'"):
        check_files(load_recipe(recipe, [files, "data.eval_split=train[:1]+tests"]).data)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.per_device_train_batch_size=0"], "training.per_device_train_batch_size=0 must be 1 or more"),
        (["training.gradient_accumulation_steps=0"], "gradient_accumulation_steps=0 must be 1 or more"),
        (["training.learning_rate=.nan"], "training.learning_rate=nan must be a finite number"),
        (["training.learning_rate=.inf"], "training.learning_rate=inf must be a finite number"),
        (["training.max_steps=-3"], "training.max_steps=-3 must be 1 or more, or -1"),
        (["training.num_train_epochs=-1.0"], "training.num_train_epochs=-1 must be"),
        (["training.save_steps=0"], "training.save_steps=0 must be a whole number of steps"),
        (["training.report_to=nosuch"], "training.report_to='nosuch' is no integration of Transformers"),
        (["training.report_to=codecarbon"], "training.report_to='codecarbon' is not installed"),
        (["training.optim=nosuch"], "training: nosuch is not a valid OptimizerNames"),
        (["training.eval_strategy=steps", "training.eval_steps=1"], "has nothing to evaluate on"),
        (["trainer=sft", "training.max_length=1"], "training.max_length=1 must be 2 or more"),
        (["training.output_dir=FOLDER/data.jsonl/out"], "training.output_dir: 'FOLDER/data.jsonl/out' cannot be"),
        (["training.output_dir=FOLDER/data.jsonl"], "training.output_dir: 'FOLDER/data.jsonl' cannot be written"),
    ],
)
def test_values_of_training_that_no_run_can_have(recipe, overrides, said):
    folder = str(recipe.parent)
    found = refusal(recipe, *(text.replace("FOLDER", folder) for text in overrides))
    assert said.replace("FOLDER", folder) in found


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.type=git"], "model: model type 'git' is refused"),
        (["model.type=t5"], "'t5' has no causal language model"),
        (["context_parallel.comm_type=[p2p]"], "comm_type lists 1 entries, but the model has 4 layers"),
        (["context_parallel.comm_type={sliding_attention: p2p}"], "the model has a full_attention layer"),
        (["model.config.num_attention_heads=3"], "num_key_value_heads=32 does not divide num_attention_heads=3"),
        (["model.config.num_hidden_layers=0"], "model.config.num_hidden_layers=0: a model needs at least 1"),
        (["model.config.vocab_size=5"], "vocab_size=5 is less than the 384 tokens of the tokenizer"),
        (["model.name=./nowhere"], "model.name: there is no folder './nowhere'"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_their_configuration(recipe, overrides, said):
    if any("model.type" in text for text in overrides):
        recipe.write_text(recipe.read_text().replace(", num_hidden_layers: 4", ""))
    assert said in refusal(recipe, *overrides)


def test_a_folder_without_a_tokenizer_or_with_garbage_for_weights(recipe):
    folder = recipe.parent / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    recipe.write_text(recipe.read_text().replace(", config: {vocab_size: 384, num_hidden_layers: 4}", ""))
    alone = [f"model.name={folder}", "model.tokenizer=null"]
    assert f"model.tokenizer: '{folder}' has no vocabulary" in refusal(recipe, *alone)
    (folder / "model.safetensors").write_bytes(b"garbage" * 9)
    assert f"{folder}/model.safetensors cannot be read as weights" in refusal(recipe, f"model.name={folder}")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    assert f"{folder}/part.safetensors cannot be read as weights" in refusal(recipe, f"model.name={folder}")


def test_processes_that_do_not_fit(recipe):
    assert "--nproc 3 is no multiple of the 2 processes of context_parallel.size" in refusal(recipe, processes=3)


@pytest.mark.parametrize("section", ["model", "data", "training", "context_parallel", "lora"])
def test_a_list_for_a_section_is_named(recipe, section):
    with pytest.raises(RecipeError, match=rf"{section}"):
        load_recipe(recipe, [f"{section}=[1]"])
    recipe.write_text(f"{section}: [1]\n")
    with pytest.raises(RecipeError, match=rf"{section}: a section has keys, and this is a list"):
        load_recipe(recipe)


@pytest.mark.parametrize("override", ["=5", " =5", "=", "training.max_steps"])
def test_an_override_without_a_name_is_refused(recipe, override):
    with pytest.raises(RecipeError, match=r"is no override. Write section.key=value"):
        load_recipe(recipe, [override])


def test_the_command_starts_no_process_for_a_recipe_that_cannot_run(recipe, monkeypatch):
    from hf_context_parallel import cli

    monkeypatch.setattr(launch.subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    with pytest.raises(RecipeError, match="learning_rate=nan"):
        cli.train(recipe, ["training.learning_rate=.nan"])
