"""Launch of a run through accelerate, and the check that it started the right number of processes."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from hf_context_parallel.distributed.last_words import CAUSE
from hf_context_parallel.distributed.process_groups import LAUNCH_ORDER
from hf_context_parallel.recipe.errors import RecipeError, without_secrets
from hf_context_parallel.recipe.schema import Recipe

LAUNCHER = "hf_context_parallel.recipe.launcher"
RUNNER = "hf_context_parallel.train"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables with the network interface of gloo and of NCCL."""
# Without these accelerate prints warnings, or takes values from a configuration file of the user. Port 0: any free.
DEFAULTS = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def launcher_arguments(processes: int, arguments: Sequence[str]) -> list[str]:
    """Build the arguments of `accelerate launch` that start the runner on one machine.

    `--multi_gpu` starts several processes, also without a GPU when `training.use_cpu` is true. `--cpu` would start one
    process, whatever `--num_processes` says.
    """
    count = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--num_processes", "1"]
    return [*count, "-m", RUNNER, *arguments]


def launch(processes: int, arguments: Sequence[str], threads: int | None = None) -> int:
    """Start the runner in `processes` processes through accelerate's launcher, and return its exit status.

    The cause of an error is printed last, after all that ranks and launchers have printed.
    The environment has `LAUNCH_ORDER` set, and messages bound to the loopback interface, unless the user has set these
    variables to something else.

    Args:
        processes: the number of processes.
        arguments: the arguments of the runner.
        threads: CPU threads of a process. By default OMP_NUM_THREADS, or 1.
    """
    environment = {LAUNCH_ORDER: "1", **on_loopback(), **os.environ}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        environment[CAUSE] = str(Path(folder) / "cause")
        command = [sys.executable, "-m", LAUNCHER, *DEFAULTS, *launcher_arguments(processes, arguments)]
        status = subprocess.run(command, env=environment).returncode
        if status and os.path.exists(environment[CAUSE]):
            sys.stdout.flush()
            print(Path(environment[CAUSE]).read_text(encoding="utf-8"), file=sys.stderr, flush=True)
    return status


def on_loopback() -> dict[str, str]:
    """Environment variables that bind messages of gloo and NCCL to this machine, so that no other one reaches them."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]  # of Linux, and of macOS
    return dict.fromkeys(INTERFACES, names[0]) if names else {}


def check_world(recipe: Recipe, training: TrainingArguments, arguments: Sequence[str]) -> None:
    """Check that the launcher started as many processes as the recipe needs.

    Args:
        recipe: the recipe.
        training: its training arguments.
        arguments: the arguments of the runner, for the command in the error.

    Raises:
        RecipeError: with all four numbers and the right command, if the number of processes does not fit.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    group = dist.get_world_size() if dist.is_initialized() else 1
    size = recipe.processes
    exact = recipe.distributed is not None
    if launched == group == training.world_size and (launched == size if exact else launched % size == 0):
        return
    wanted = size if exact else max(launched // size, 1) * size
    needed = f"{recipe.source_of_processes} of the recipe"
    if not (training.use_cpu or torch.cuda.is_available()):
        # Without use_cpu, TrainingArguments looks for GPUs, and every process would train alone.
        arguments = [*(given for given in arguments if "use_cpu" not in given), "training.use_cpu=true"]
    raise RecipeError(
        "The number of processes does not fit the recipe:\n"
        f"  WORLD_SIZE, set by the launcher     {launched}{'' if 'WORLD_SIZE' in os.environ else ' (not set)'}\n"
        f"  size of the process group           {group}\n"
        f"  TrainingArguments.world_size        {training.world_size}\n"
        f"  {needed:<35} {size}\n"
        f"The first three must be equal, and {'equal to' if exact else 'a multiple of'} the last. Start the run with\n"
        f"  accelerate launch {shlex.join(launcher_arguments(wanted, [*map(without_secrets, arguments)]))}\n"
        "(The launcher's `--cpu` starts one process, whatever `--num_processes` says.)"
    )


def trusted(model: str | None) -> str:
    """Say that the code that comes with a model runs here, since the user asked for it."""
    return f"trust_remote_code is on: the code in the repository of {model} runs on this machine."
