"""Ranks of a drill: a small run that is killed at a random moment, or that runs to its end."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback, TrainingArguments

import hf_context_parallel as hcp

STEPS, SAVE_STEPS = 10, 2
LAST_KILL = STEPS - 2
"""Last step in which a run is killed. A run that has saved its last step would have nothing to resume."""
PHASES = ("forward", "backward", "between steps", "saving")
EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
"""Events between backward and forward."""
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")
FAMILY = {
    "DDP": {},
    "LoRA": {},
    "FSDP2": {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
}
"""Arguments of the Trainer for each way to hold the weights."""


def run(rank: int, ranks: int, folder: str, store: str, family: str, kill: tuple | None) -> None:
    """Train, from the newest whole checkpoint in `folder` if there is one.

    Args:
        store: a file for the process group, of this launch alone.
        kill: the phase in which the ranks are killed, a seed that says when, and what `measure` found. None
            trains to the end, and measures.
    """
    torch.set_num_threads(1)
    gc.freeze()  # what was imported takes half a second of each collection
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in launched.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}
    log = open(f"{store}.log{rank}", "w")  # noqa: SIM115 - it is open until the process ends
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    Path(f"{store}.pid{rank}").write_text(str(os.getpid()))
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    trainer = make_trainer(folder, family)
    trainer.add_callback(_Weights(trainer, Path(folder, "weights.jsonl")))
    if kill is not None:
        trainer.add_callback(_Killer(trainer, *kill, rank, ranks, store))
    elif rank == 0:
        measure(trainer, Path(f"{store}.measured"))
    trainer.train(resume_from_checkpoint=True)
    dist.barrier()
    os._exit(0)


def make_trainer(folder: str, family: str) -> hcp.ContextParallelTrainer:
    """Make the Trainer of a tiny Llama, with Adam. LoRA has dropout, whose random states a checkpoint holds."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, num_key_value_heads=2, max_position_embeddings=256, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="context_parallel")
    if family == "LoRA":
        targets = ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM"))
    draw = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(3, 128, (24 + n,), generator=draw).tolist()} for n in range(2 * STEPS)]
    args = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        **FAMILY[family],
    )
    settings = hcp.ContextParallelConfig(size=2, verify=False)
    return hcp.ContextParallelTrainer(model, args, _batch, rows, context_parallel=settings)


def _batch(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def watch_saves(
    trainer: hcp.ContextParallelTrainer,
    begin: Callable[[], None],
    count: Callable[[int], None],
    end: Callable[[float], None],
) -> None:
    """Watch each checkpoint that is saved: its begin, its accesses to files that Python sees, and its seconds."""
    save, events, is_on = trainer._save_checkpoint, 0, False

    def note(event: str, arguments: tuple) -> None:
        nonlocal events
        if is_on and event in FILE_EVENTS:
            events += 1
            count(events)

    def watched(*arguments: Any) -> None:
        nonlocal events, is_on
        events, started = 0, time.perf_counter()
        begin()
        is_on = True
        save(*arguments)
        is_on = False
        end(time.perf_counter() - started)

    sys.addaudithook(note)
    trainer._save_checkpoint = watched


def watch_autograd(
    trainer: hcp.ContextParallelTrainer,
    begin: Callable[[], None],
    forward: Callable[[], None],
    backward: Callable[[], None],
) -> None:
    """Watch each training step, each tensor that its forward saves for backward, and each that backward takes.

    Hooks of modules would change the way that some of them compute.
    """
    step = trainer.training_step

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        forward()
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        backward()
        return tensor

    def watched(*arguments: Any, **keywords: Any) -> torch.Tensor:
        begin()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return step(*arguments, **keywords)

    trainer.training_step = watched


def measure(trainer: hcp.ContextParallelTrainer, path: Path) -> None:
    """Write into a file, of the last step the saved tensors, of the last checkpoint seconds and accesses to files."""
    found = {"events": 0, "seconds": 0.0, "tensors": 0}

    def end(seconds: float) -> None:
        found["seconds"] = seconds
        path.write_text(json.dumps(found))

    def saved() -> None:
        found["tensors"] += 1

    watch_saves(trainer, lambda: None, lambda events: found.update(events=events), end)
    watch_autograd(trainer, lambda: found.update(tensors=0), saved, lambda: None)


class _Weights(TrainerCallback):
    """Callback that writes a checksum of all weights after each step."""

    def __init__(self, trainer: hcp.ContextParallelTrainer, path: Path):
        self._trainer, self._path = trainer, path

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        digest = hashlib.sha256()
        for weight in self._trainer.model.parameters():
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            digest.update(whole.detach().contiguous().numpy().data)
        if args.process_index == 0:
            with self._path.open("a") as file:
                print(json.dumps([state.global_step, digest.hexdigest()]), file=file)


class _Killer(TrainerCallback):
    """Callback that kills all ranks at a random moment of a phase.

    One rank, drawn too, kills the others and itself. It writes the phase into a file before.
    """

    def __init__(
        self,
        trainer: hcp.ContextParallelTrainer,
        phase: str,
        seed: int,
        measured: dict[str, Any],
        rank: int,
        ranks: int,
        store: str,
    ):
        self._trainer, self._phase, self._measured, self._store = trainer, phase, measured, store
        self._pids = [Path(f"{store}.pid{other}") for other in range(ranks)]
        self._draw = random.Random(seed)
        self._by_files = phase == "saving" and seed % 2 == 0
        victim = 0 if self._by_files else self._draw.randrange(ranks)
        self._is_victim = rank == victim
        self._step = self._left = 0
        self._armed = False

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._step = self._draw.randint(state.global_step + 1, min(state.global_step + 3, LAST_KILL))
        if self._phase in ("forward", "backward"):
            self._left = self._draw.randrange(self._measured["tensors"])
            is_forward = self._phase == "forward"
            nothing = lambda: None  # noqa: E731
            watch_autograd(
                self._trainer,
                begin=nothing,
                forward=self._pass if is_forward else nothing,
                backward=nothing if is_forward else self._pass,
            )
        elif self._phase == "between steps":
            setattr(self, self._draw.choice(EVENTS), self._between)
        elif self._is_victim:
            self._watch_saving()

    @property
    def _in_step(self) -> bool:
        return self._trainer.model.training and self._trainer.state.global_step + 1 >= self._step

    def _pass(self) -> None:
        if self._in_step:
            self._left -= 1
            if self._left < 0:
                self._kill(self._phase)

    def _between(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step >= self._step - 1:
            self._kill("between steps")

    def _watch_saving(self) -> None:
        """Kill while a checkpoint is saved: at a random access to a file, or after a random time."""
        number, share = self._draw.randrange(self._measured["events"]), self._draw.random()

        def begin() -> None:
            nonlocal share
            if self._trainer.state.global_step < self._step - 1:
                return
            self._armed = True
            if not self._by_files:
                seconds, share = share * self._measured["seconds"], 0.7 * share
                threading.Thread(target=self._kill_after, args=(seconds,), daemon=True).start()

        def count(events: int) -> None:
            if self._armed and self._by_files and events > number:
                self._kill("saving")

        def end(seconds: float) -> None:
            self._armed = False

        watch_saves(self._trainer, begin, count, end)

    def _kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        if self._armed:
            self._kill("saving")

    def _kill(self, phase: str) -> None:
        if not self._is_victim:
            return  # all ranks are watched alike
        self._armed = False
        Path(f"{self._store}.killed").write_text(phase)
        for path in self._pids:
            pid = int(path.read_text())
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
