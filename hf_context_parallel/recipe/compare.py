"""Comparison of a recipe on several ranks with the same recipe on one process: losses, speed and memory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.launch import launch
from hf_context_parallel.recipe.preflight import check_recipe
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.recipe.report import training_steps

TOLERANCE = 1e-4  # relative difference of the losses
MEASURES = {"peak_memory_gib": "peak GiB a rank", "tokens_per_second": "tokens/s"}


def compare_with_one_process(path: Path, overrides: Sequence[str], processes: int | None = None) -> int:
    """Run a recipe on several ranks and on one process, and print a table of both.

    The one process has as many CPU threads as all ranks together. It accumulates the gradients of as many batches as
    all CP groups read at a time.

    Args:
        path: the recipe.
        overrides: values that replace those of the recipe, such as `training.max_steps=3`.
        processes: the number of ranks. By default as many as the recipe needs.

    Returns:
        The exit status: 0 if the losses of every step are equal to a relative 1e-4.

    Raises:
        RecipeError: if the recipe is invalid, or does not split the sequence.
    """
    recipe = load_recipe(path, overrides)
    if recipe.context_parallel.size == 1:
        raise RecipeError("context_parallel.size=1 leaves nothing to compare. Set it to 2 or more.")
    ranks = processes or recipe.processes
    check_recipe(recipe, ranks)
    folder = Path(recipe.training.output_dir or "trainer_output")
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))
    groups = ranks // (recipe.context_parallel.size * recipe.tensor_ranks)
    alone = [
        f"training.output_dir={folder / 'one_process'}",
        f"training.gradient_accumulation_steps={groups * (recipe.training.gradient_accumulation_steps or 1)}",
        "training.fsdp=null",
        "training.fsdp_config=null",
        "training.deepspeed=null",
        "context_parallel.size=1",
        "context_parallel.a2a_size=null",
        "context_parallel.sequence_parallel=false",
        "context_parallel.tile_tokens=null",
        "context_parallel.dynamic=false",
        "context_parallel.max_tokens_per_rank=null",
        "distributed=null",
    ]
    for count, changes in ((ranks, []), (1, alone)):
        share = threads * ranks // count
        print(f"\n{path} on {count} rank{'s' * (count > 1)} of {share} thread{'s' * (share > 1)}", flush=True)
        status = launch(count, [str(path), *overrides, *changes], threads=share)
        if status:
            return status
    split, whole = read_steps(folder), read_steps(folder / "one_process")
    print("\n" + table(split, whole, ranks))
    worst = max(difference(a["loss"], b["loss"]) for a, b in zip(split, whole, strict=True))
    equal = worst <= TOLERANCE
    print(f"\nThe losses are {'the same' if equal else 'NOT the same'}: largest relative difference {worst:.1e}.")
    print(f"Report: {folder / 'report.md'}")
    return 0 if equal else 1


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Read the log lines of the training steps of the run in `folder`.

    Raises:
        RecipeError: if no step was logged.
    """
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = training_steps(history)
    if not steps:
        raise RecipeError(f"the run in {folder} logged no step. Lower training.logging_steps, for example to 1.")
    return steps


def difference(left: float, right: float) -> float:
    """Compute the difference of two numbers, relative to `right`. It is infinite if either is NaN."""
    gap = abs(left - right)
    return gap / abs(right) if gap == gap else float("inf")


def table(split: Sequence[dict[str, Any]], whole: Sequence[dict[str, Any]], ranks: int) -> str:
    """Format a table with a line for each step of the two runs, and the medians of memory and speed."""
    measures = {key: words for key, words in MEASURES.items() if all(key in step for step in (*split, *whole))}
    rows = [
        [a["step"], a["loss"], b["loss"], f"{difference(a['loss'], b['loss']):.1e}"]
        + [step[key] for key in measures for step in (a, b)]
        for a, b in zip(split, whole, strict=True)
    ]
    rows.append(
        ["median", "", "", ""] + [median(step[key] for step in run) for key in measures for run in (split, whole)]
    )
    both = (f"{ranks} ranks", "1 rank")
    headers = ["step", *(f"loss\n{run}" for run in both), "relative\ndifference"]
    headers += [f"{heading}\n{run}" for heading in measures.values() for run in both]
    return tabulate(rows, headers, tablefmt="simple", floatfmt=("", ".6f", ".6f", "", ".3f", ".3f", ",.0f", ",.0f"))
