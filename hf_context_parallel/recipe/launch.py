"""The command that starts the processes of a run, and the check that it did."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.schema import PARALLEL_SIZES, Recipe

RUNNER = "hf_context_parallel.train"
# What accelerate would otherwise remark on, or take from a configuration file of the user. Port 0: any that is free.
DEFAULTS = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def launcher_arguments(processes: int, arguments: Sequence[str]) -> list[str]:
    """What follows `accelerate launch` to start the runner on one machine.

    `--multi_gpu` is what starts several processes without a GPU too, when `training.use_cpu` is true; `--cpu` starts
    one, whatever `--num_processes` says.
    """
    count = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--num_processes", "1"]
    return [*count, "-m", RUNNER, *arguments]


def launch(processes: int, arguments: Sequence[str], threads: int | None = None) -> int:
    """Runs the runner in `processes` processes through accelerate's launcher and returns its exit status.

    `threads` is the number of CPU threads of a process; without it, OMP_NUM_THREADS or else 1.
    """
    environment = os.environ if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)}
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return subprocess.run(
        [*accelerate, *DEFAULTS, *launcher_arguments(processes, arguments)], env=environment
    ).returncode


def check_world(recipe: Recipe, training: TrainingArguments, arguments: Sequence[str]) -> None:
    """Raises RecipeError, with all four numbers and the right command, unless the launch gave what the recipe needs.

    `arguments` are the runner's own, for the command.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    group = dist.get_world_size() if dist.is_initialized() else 1
    size = recipe.processes
    exact = recipe.distributed is not None
    if launched == group == training.world_size and (launched == size if exact else launched % size == 0):
        return
    wanted = size if exact else max(launched // size, 1) * size
    source = " * ".join(f"distributed.{name}" for name in PARALLEL_SIZES if getattr(recipe.distributed, name, None))
    needed = f"{source or 'context_parallel.size'} of the recipe"
    if not (training.use_cpu or torch.cuda.is_available()):
        # Without it TrainingArguments looks for GPUs, and every process is alone.
        arguments = [*(given for given in arguments if "use_cpu" not in given), "training.use_cpu=true"]
    raise RecipeError(
        "The number of processes does not fit the recipe:\n"
        f"  WORLD_SIZE, set by the launcher     {launched}{'' if 'WORLD_SIZE' in os.environ else ' (not set)'}\n"
        f"  size of the process group           {group}\n"
        f"  TrainingArguments.world_size        {training.world_size}\n"
        f"  {needed:<35} {size}\n"
        f"The first three must be equal, and {'equal' if exact else 'a multiple of'} the last. Start the run with\n"
        f"  accelerate launch {shlex.join(launcher_arguments(wanted, arguments))}\n"
        "(The launcher's `--cpu` starts one process, whatever `--num_processes` says.)"
    )
