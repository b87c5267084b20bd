"""Comparison of training runs on shards with the same runs without CP, and the page of its findings."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ...distributed.worker_pool import WorkerPool
from .cases import TABLES, Case
from .run import Result, run

RUNS = {"CP 2": (2, 1), "DP 2 x CP 2": (2, 2)}
"""Ranks of a CP group and number of groups, by the words of the table. A run is compared with as many processes as it
has groups, since TRL logs means over processes, which groups of unequal length change."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
START = "<!-- made by hf-context-parallel check --trainers --write -->"

OF_DEEPSPEED = 900
"""Timeout in seconds for a run of DeepSpeed, which compiles its extensions when they are first used."""

OnRanks = Callable[..., list[Any]]


@dataclass(frozen=True)
class Finding:
    """Finding of one case.

    Args:
        name: name of the case.
        state: `exact`, `refused` or `wrong`.
        errors: largest error by the words of the run, or an empty dictionary.
        reason: the message of a refusal, or the number that is wrong.
    """

    name: str
    state: str
    errors: dict[str, float]
    reason: str = ""


def compare(name: str, case: Case, on_ranks: OnRanks, runs: Iterable[str] = RUNS) -> Finding:
    """Compare one case on shards with the same case without CP.

    Args:
        on_ranks: runs a function on some ranks; see `WorkerPool`.
        runs: names of the runs, of `RUNS`.
    """
    if case.refused is not None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                on_ranks(2, run, case, folder, 2)
            except AssertionError as error:
                if case.refused in str(error):
                    return Finding(name, "refused", {}, _message(str(error)))
                raise
        return Finding(name, "wrong", {}, "it was not refused")
    errors: dict[str, float] = {}
    reason = ""
    for words in runs:
        size, groups = RUNS[words]
        with tempfile.TemporaryDirectory() as folder, _ranks_for(case, on_ranks) as of_shards:
            expected = on_ranks(groups, run, case, f"{folder}/whole", 0, groups)[0]
            for found in of_shards(size * groups, run, case, f"{folder}/shards", size, groups):
                error, worst = largest_error(found, expected)
                if not found.is_sharded:
                    error, worst = float("inf"), "the model, which computed no shard"
                if error >= errors.get(words, 0.0):
                    errors[words], reason = error, worst if error > case.bound else reason
    return Finding(name, "wrong" if reason else "exact", errors, reason)


@contextmanager
def _ranks_for(case: Case, on_ranks: OnRanks) -> Iterator[OnRanks]:
    """Yield ranks that can run a case. DeepSpeed needs new ones, since it keeps the groups that it found first."""
    if case.zero is None:
        yield on_ranks
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    workers = WorkerPool(4, OF_DEEPSPEED)
    try:
        yield workers
    finally:
        workers.close()


def _message(text: str) -> str:
    """Take the message of the last error from the output of ranks."""
    return text.strip().splitlines()[-1].removeprefix("ValueError: ").removeprefix("rank 0 of the group: ")


def largest_error(found: Result, expected: Result) -> tuple[float, str]:
    """Return the largest error of a run, and the number that it is an error of.

    Logged figures are compared relative to their own size and weights relative to the largest. A figure that only one
    run logs is an infinite error.
    """
    errors = {"the weights": float(np.abs(found.weights - expected.weights).max() / np.abs(expected.weights).max())}
    if len(found.logs) != len(expected.logs):
        return float("inf"), f"{len(found.logs)} logs in place of {len(expected.logs)}"
    for number, (mine, theirs) in enumerate(zip(found.logs, expected.logs), start=1):
        for name in mine.keys() | theirs.keys():
            errors[f"{name} of log {number}"] = _error(mine.get(name), theirs.get(name))
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def _error(found: float | None, expected: float | None) -> float:
    """Return the relative error of a number. Those below 0.01 are compared as if they were 0.01."""
    if found is None or expected is None:
        return float("inf")
    if np.isnan(found) or np.isnan(expected):
        return 0.0 if np.isnan(found) and np.isnan(expected) else float("inf")
    return abs(found - expected) / max(abs(expected), 1e-2)


def select(words: Iterable[str]) -> Iterator[tuple[str, Case]]:
    """List the cases whose names contain one of these words, or all cases without any."""
    wanted = [word.lower() for word in words]
    for cases in TABLES.values():
        for name, case in cases.items():
            if not wanted or any(word in name.lower() for word in wanted):
                yield name, case


def page(findings: Iterable[Finding]) -> str:
    """Write the tables of the page `docs/trainers.md`, with the versions that were compared."""
    by_name = {finding.name: finding for finding in findings}
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in PACKAGES)
    lines = [START, "", f"Compared with {versions}.", ""]
    for title, cases in TABLES.items():
        rows = [_row(by_name[name]) for name in cases]
        lines += [f"## {title}", "", tabulate(rows, ["run", "state", *RUNS, "note"], tablefmt="github"), ""]
    return "\n".join(lines)


def _row(finding: Finding) -> list[str]:
    errors = [f"{finding.errors[words]:.0e}" if words in finding.errors else "" for words in RUNS]
    return [finding.name, finding.state, *errors, finding.reason.split(". ")[0]]


def write_page(findings: Iterable[Finding], path: Path) -> None:
    """Write the tables into the page, below its introduction."""
    introduction = path.read_text().split(START)[0]
    path.write_text(introduction + page(findings))
