"""Optional packages are imported when they are used. Training needs torch, Transformers and accelerate alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.metadata import version

import pytest

from hf_context_parallel import __version__
from hf_context_parallel.recipe.report import NO_PLOT, write_report

OPTIONAL = ("datasets", "deepspeed", "matplotlib", "omegaconf", "peft", "pydantic", "tabulate", "typer")
SCRIPT = f"""
import multiprocessing
import os
import sys

for name in {OPTIONAL}:
    sys.modules[name] = None  # as if it were not installed

from transformers import DataCollatorForSeq2Seq, ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM, TrainingArguments

import hf_context_parallel as hcp


def train(rank):
    os.environ |= {{"RANK": rank, "LOCAL_RANK": rank}}
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
    sys.stdout.flush()


# The ranks are forks, so that all is imported once.
ranks = [multiprocessing.get_context("fork").Process(target=train, args=(rank,)) for rank in "01"]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join()
sys.exit(max(abs(rank.exitcode) for rank in ranks))
"""


def test_the_version_is_that_of_the_package():
    assert __version__ == version("hf_context_parallel")


@pytest.mark.distributed
def test_torch_transformers_and_accelerate_are_enough_to_train(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "output")],
        env=os.environ | launched | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
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
