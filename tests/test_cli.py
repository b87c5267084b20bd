"""Command, runner and example, started as users start them: in real processes, offline."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM

from hf_context_parallel import cli, train

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parent.parent
DEMO = "recipes/demo_cpu.yaml"
COMMAND = [str(Path(sys.executable).parent / "hf-context-parallel")]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]


@pytest.fixture
def run(tmp_path):
    """Run a command in the project's folder, offline and with an empty cache."""
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TERM": "dumb",
    }

    def run(*command, **changes):
        return subprocess.run(
            command, cwd=ROOT, env=environment | changes, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return run


UNKNOWN = "training.max_stepz: unknown key in the section 'training'. Did you mean 'max_steps'?"


def test_mistakes_are_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(sys, "argv", [*COMMAND, "train", str(ROOT / DEMO), "training.max_stepz=3"])
    with pytest.raises(SystemExit, match=re.escape(UNKNOWN)):
        cli.main()


@pytest.mark.exhaustive
def test_a_command_with_a_mistake_ends_without_a_traceback(run):
    result = run(*COMMAND, "train", DEMO, "training.max_stepz=3")
    assert result.returncode == 1
    assert UNKNOWN in result.stdout
    assert "Traceback" not in result.stdout


REFUSED = "rank 0 of the group: kernel='torch' cannot be used"


@pytest.mark.exhaustive
def test_a_refusal_is_printed_once_and_last(run, tmp_path):
    changes = [DEMO, "context_parallel.kernel=torch", f"training.output_dir={tmp_path}"]
    result = run(*COMMAND, "train", *changes)
    assert result.returncode == 1
    assert result.stdout.count(REFUSED) == 1 and "Traceback" not in result.stdout
    assert result.stdout.strip().splitlines()[-1].startswith(REFUSED)
    start = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    result = run(*ACCELERATE, *start, "-m", "hf_context_parallel.train", *changes)
    _, _, report = result.stdout.partition("Root Cause (first observed failure)")
    assert REFUSED in report


AGREED = """
import torch.distributed as dist, hf_context_parallel as hcp
dist.init_process_group("gloo")
cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2))
cp.shard({"input_ids": dist.get_rank()}).__enter__()
"""


@pytest.mark.exhaustive
def test_one_rank_of_a_script_prints_an_error_of_all(run, tmp_path):
    (tmp_path / "script.py").write_text(AGREED)
    start = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    result = run(*ACCELERATE, *start, str(tmp_path / "script.py"))
    before, _, report = result.stdout.partition("ChildFailedError:")
    _, _, report = report.partition("Root Cause (first observed failure)")
    error = "ValueError: rank 0 of the group: input_ids is a int"
    assert before.count(error) == 1 and error in report
    assert "rank 1 ends by the same error" in before


TOO_FEW = (
    "WORLD_SIZE, set by the launcher     1 (not set)",
    "size of the process group           1",
    "TrainingArguments.world_size        1",
    "context_parallel.size of the recipe 2",
    "accelerate launch --multi_gpu --num_processes 2 -m hf_context_parallel.train {recipe} training.seed=3",
)


def message_to_a_lone_process() -> str:
    """Call the runner as in a process that no launcher has started."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    with pytest.raises(SystemExit) as ended:
        train.main(ROOT / DEMO, ["training.seed=3"])
    return str(ended.value)


def test_too_few_processes_are_told_with_the_right_command(on_ranks):
    [message] = on_ranks(1, message_to_a_lone_process)
    for line in TOO_FEW:
        assert line.format(recipe=ROOT / DEMO) in message


@pytest.mark.exhaustive
def test_a_launcher_that_starts_too_few_processes_is_told_the_right_command(run):
    # `--cpu` starts one process, whatever `--num_processes` says.
    result = run(
        *ACCELERATE, "--cpu", "--num_processes", "2", "-m", "hf_context_parallel.train", DEMO, "training.seed=3"
    )
    assert result.returncode != 0
    for line in TOO_FEW:
        assert line.format(recipe=DEMO) in result.stdout


@pytest.mark.exhaustive
def test_processes_that_would_train_apart_are_told(run):
    # Without a GPU and without use_cpu, TrainingArguments sees a world of one process in each launched process.
    arguments = ["-m", "hf_context_parallel.train", DEMO]
    start = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    result = run(*ACCELERATE, *start, *arguments, "training.use_cpu=false", "training.seed=3")
    assert result.returncode != 0
    for line in (
        "WORLD_SIZE, set by the launcher     2\n",
        "size of the process group           2\n",
        "TrainingArguments.world_size        1\n",
        f"launch --multi_gpu --num_processes 2 {' '.join(arguments)} training.seed=3 training.use_cpu=true\n",
    ):
        assert line in result.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["llama3_8b_lora_128k", "qwen3_8b_qlora_64k", "llama3_8b_dpo_64k"])
def test_recipes_for_large_machines_run_dry(run, name):
    result = run(*COMMAND, "train", f"recipes/{name}.yaml", "--dry-run", "--nproc", "2")
    assert result.returncode == 0, result.stdout
    assert f"Dry run of recipes/{name}.yaml. In place of what it names:" in result.stdout
    assert "context_parallel.size: 2, the number of processes" in result.stdout
    assert f"The recipe is valid: recipes/{name}.yaml ran one step." in result.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", ["phi3", "llama4_text"])
def test_models_of_the_hub_run_dry(run, tmp_path, model_type):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: somebody/something, type: {model_type}}}\ndata: {{path: any, max_length: 1024}}\n"
    )
    result = run(*COMMAND, "train", str(recipe), "--dry-run", "--nproc", "2")
    assert result.returncode == 0, result.stdout
    assert f"model: a tiny {model_type} with random weights, for somebody/something" in result.stdout


@pytest.mark.versions
def test_a_split_run_equals_one_process(run, tmp_path):
    output = tmp_path / "output"
    changes = [f"training.output_dir={output}", "training.max_steps=2", "training.save_strategy=steps"]
    result = run(*COMMAND, "compare", DEMO, *changes, "data.max_length=1024")
    assert result.returncode == 0, result.stdout
    assert "The losses are the same" in result.stdout
    for folder in (output, output / "one_process"):
        assert {"report.md", "report.png", "trainer_state.json", "model.safetensors"} <= set(os.listdir(folder))
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert [entry["sequence_length"] for entry in history if "loss" in entry] == [1024, 1024]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name",
    [
        *("demo_ddp", "demo_fsdp2", "demo_offload", "demo_zero_offload", "demo_hsdp", "demo_experts", "dynamic"),
        *("megatron_quick_start", "sft"),
    ],
)
def test_recipes_of_several_dimensions_equal_one_process(run, tmp_path, name):
    if "zero" in name:
        pytest.importorskip("deepspeed", reason="it comes with `pip install -e '.[deepspeed]'`")
    processes = ["--nproc", "4"] if name.removeprefix("demo_") in ("ddp", "fsdp2", "offload", "zero_offload") else []
    changes = [f"training.output_dir={tmp_path}", "data.max_length=1024"]
    changes += ["context_parallel.max_tokens_per_rank=512"] if name == "dynamic" else []
    result = run(*COMMAND, "compare", f"recipes/{name}_cpu.yaml", *changes, *processes)
    assert result.returncode == 0, result.stdout
    assert "The losses are the same" in result.stdout


@pytest.mark.exhaustive
def test_a_run_of_deepspeed_resumes_to_the_same_bits(run, tmp_path):
    pytest.importorskip("deepspeed", reason="it comes with `pip install -e '.[deepspeed]'`")
    changes = ["data.max_length=512", "training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2"]
    weights = []
    for folder in (tmp_path / "whole", tmp_path / "resumed"):
        arguments = [*changes, f"training.output_dir={folder}", "training.resume_from_checkpoint=true"]
        result = run(*COMMAND, "train", "recipes/demo_zero_offload_cpu.yaml", *arguments)
        assert result.returncode == 0, result.stdout
        weights.append(load_file(folder / "checkpoint-4" / "model.safetensors"))
        if folder.name == "whole":
            shutil.copytree(folder / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    whole, resumed = weights
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture
def tiny_folder(tmp_path):
    """Folder with a tiny model and its tokenizer."""
    model = tmp_path / "model"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(vocab_size=384, num_attention_heads=4, num_key_value_heads=2, **small)
    Qwen3ForCausalLM(config).save_pretrained(model)
    ByT5Tokenizer().save_pretrained(model)
    return model


LAUNCH = *ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"


@pytest.mark.versions
def test_the_example_trains(run, tiny_folder, tmp_path):
    result = run(
        *(*LAUNCH, "examples/finetune.py", "--model", str(tiny_folder), "--files", json.__file__, "--cpu"),
        *("--max-length", "512", "--max-steps", "2", "--output-dir", str(tmp_path / "output")),
    )
    assert result.returncode == 0, result.stdout
    Qwen3ForCausalLM.from_pretrained(tmp_path / "output")


@pytest.mark.exhaustive
def test_the_example_of_a_loop_trains(run, tiny_folder):
    files = [json.__file__, json.decoder.__file__, json.encoder.__file__]
    result = run(
        *(*LAUNCH, "examples/accelerate_loop.py", "--model", str(tiny_folder), "--files", *files, "--cpu"),
        *("--max-length", "512"),
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("loss ") == len(files)


@pytest.mark.exhaustive
def test_an_interrupt_ends_the_loop_of_a_shell_too():
    """Assert that the command dies of the signal. A shell goes on with its loop if it only exits with 130."""
    code = (
        "from unittest import mock; from hf_context_parallel import cli; "
        "cli.app = mock.Mock(side_effect=SystemExit(130)); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGINT
