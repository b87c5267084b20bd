"""Command `hf-context-parallel check --trainers`, which shows progress and prints a table."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from hf_context_parallel.distributed.worker_pool import WorkerPool
from hf_context_parallel.verification.trainers.compare import RUNS, Finding, compare, select, write_page

PAGE = Path("docs/trainers.md")
TIMEOUT = 300
"""Timeout in seconds for one run."""


def run_check_trainers(words: Sequence[str], keep: bool) -> int:
    """Compare trainers on shards with the same trainers without CP, and print a table of the findings.

    Args:
        words: parts of the names of the cases; none for all.
        keep: write the findings into the project's documentation.

    Returns:
        The exit status: 0 if everything is exact or refused as it should, 1 if not, 2 if an argument is wrong.
    """
    cases = list(select(words))
    if not cases:
        print(f"No trainer is called {' or '.join(words)}. Give a part of a name in {PAGE}, or none.", file=sys.stderr)
        return 2
    if keep and (words or not PAGE.is_file()):
        print(f"--write needs all trainers, and the project's folder, which has {PAGE}.", file=sys.stderr)
        return 2
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    workers, findings = WorkerPool(4, TIMEOUT), []
    progress = tqdm(cases, unit="run", disable=len(cases) == 1)
    for name, case in progress:
        progress.set_postfix_str(name)
        try:
            findings.append(compare(name, case, workers))
        except AssertionError as error:
            findings.append(Finding(name, "fails", {}, str(error).strip().splitlines()[-1]))
    workers.close()
    rows = [
        [x.name, x.state, *(f"{x.errors.get(words, float('nan')):.0e}" for words in RUNS), x.reason] for x in findings
    ]
    print(tabulate(rows, ["run", "state", *RUNS, "note"], maxcolwidths=[45, None, None, None, 60]))
    if keep:
        write_page(findings, PAGE)
    return int(any(finding.state not in ("exact", "refused") for finding in findings))
