"""Optional packages are imported when they are used. Training needs torch, Transformers and accelerate alone."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from hf_context_parallel import __version__
from hf_context_parallel.recipe.report import NO_PLOT, write_report

OPTIONAL = ("datasets", "deepspeed", "matplotlib", "omegaconf", "peft", "pydantic", "tabulate", "typer")
SCRIPT = f"""
import sys

for name in {OPTIONAL}:
    sys.modules[name] = None  # as if it were not installed

from transformers import DataCollatorForSeq2Seq, ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM, TrainingArguments

import hf_context_parallel as hcp

args = TrainingArguments(sys.argv[1], use_cpu=True, max_steps=1, save_strategy="no", logging_steps=1)
config = Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)
config._attn_implementation = "context_parallel"
row = list(range(3, 33))
trainer = hcp.ContextParallelTrainer(
    model=Qwen3ForCausalLM(config),
    args=args,
    train_dataset=[{{"input_ids": row, "labels": row}}] * 16,
    data_collator=DataCollatorForSeq2Seq(ByT5Tokenizer()),
    context_parallel=hcp.ContextParallelConfig(size=2),
)
trainer.train()
found = [name for name in {OPTIONAL} if sys.modules[name]]
sys.stdout.write(f"trained {{trainer.state.global_step}} {{found}}\\n")  # in one piece, beside the other rank's
"""


def test_the_version_is_that_of_the_package():
    assert __version__ == version("hf_context_parallel")


@pytest.mark.distributed
def test_torch_transformers_and_accelerate_are_enough_to_train(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, "--multi_gpu", "--num_processes", "2", str(script), str(tmp_path / "output")],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("trained 1 []") == 2, done.stdout


def test_a_report_without_matplotlib_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write_report(tmp_path, "A run", [{"step": 1, "loss": 2.0}])
    assert NO_PLOT in text.read_text() and not (tmp_path / "report.png").exists()
