"""Report of a run: `report.md` has a table with a row for each logged step, and `report.png` has curves."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_PLOT = "matplotlib is not installed, so no curves were drawn. Get it: `pip install 'hf_context_parallel[plots]'`."
"""Sentence in the report when matplotlib is not installed."""

# Keys of a log line, in the order of the table's columns, with their headings.
COLUMNS = {
    "step": "step",
    "epoch": "epoch",
    "loss": "loss",
    "eval_loss": "evaluation loss",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "sequence_length": "sequence length",
    "tokens_per_second": "tokens/s",
    "tokens_per_second_per_rank": "tokens/s a rank",
    "peak_memory_gib": "peak memory a rank (GiB)",
    "idle_share": "idle (estimated)",
}


def write_report(
    folder: str | Path, title: str, log_history: list[dict[str, Any]], counts: Sequence[str] = ()
) -> Path:
    """Write the report of `trainer.state.log_history` into `folder`, and return the path of `report.md`.

    Args:
        counts: sentences on the data of the run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = [entry for entry in log_history if "loss" in entry or "eval_loss" in entry]
    curves = NO_PLOT
    if importlib.util.find_spec("matplotlib"):
        plot(steps).savefig(folder / "report.png", dpi=120)
        curves = "![Loss and throughput](report.png)"
    keys = [key for key in COLUMNS if any(key in entry for entry in steps)]
    table = tabulate(
        [[entry.get(key, "") for key in keys] for entry in steps],
        headers=[COLUMNS[key] for key in keys],
        tablefmt="github",
        floatfmt=".6g",
    )
    text = folder / "report.md"
    parts = [f"# {title}", summary(steps), *counts, curves, table]
    text.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return text


def training_steps(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select the log lines of training steps, without evaluations and the summary of the run."""
    return [entry for entry in log_history if "loss" in entry]


def summary(steps: list[dict[str, Any]]) -> str:
    """Summarise the run in one sentence."""
    losses, speed, memory = (
        [entry[key] for entry in steps if key in entry] for key in ("loss", "tokens_per_second", "peak_memory_gib")
    )
    facts = [f"{steps[-1]['step']} steps"] if steps else ["No steps"]
    if losses:
        facts.append(f"loss {losses[0]:.4f} at the first log line and {losses[-1]:.4f} at the last")
    if speed:
        facts.append(f"{median(speed):,.0f} tokens/s (median)")
    if memory:
        facts.append(f"at most {max(memory):.2f} GiB a rank above the start of a step")
    return "; ".join(facts) + "."


def plot(steps: list[dict[str, Any]]) -> Figure:
    """Plot loss and throughput over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, speed = figure.subplots(1, 2)
    for axes, keys, label in (
        (loss, {"loss": "training", "eval_loss": "evaluation"}, "loss"),
        (speed, {"tokens_per_second": "all ranks", "tokens_per_second_per_rank": "one rank"}, "tokens/s"),
    ):
        for key, name in keys.items():
            points = [(entry["step"], entry[key]) for entry in steps if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    speed.set_ylim(bottom=0)
    return figure
