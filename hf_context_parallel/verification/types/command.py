"""The command `hf-context-parallel check`: progress while it runs, and a table."""

from __future__ import annotations

import sys
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from hf_context_parallel.config import COMM_TYPES
from hf_context_parallel.integration.model_registry import KNOWN, KNOWN_TENSOR_PARALLEL
from hf_context_parallel.verification.types.survey import (
    GOOD,
    Finding,
    default_jobs,
    how,
    model_types,
    survey,
    survey_tensor_parallel,
    write,
    write_tensor_parallel,
)

PAGE = Path("docs/models.md")


def run_check(
    model: str | None, every: bool, ranks: str | None, comm_type: str, jobs: int | None, keep: bool, tp_size: int = 1
) -> int:
    """Check one model, or all types, and print what was found.

    Returns:
        The exit status: 0 if everything is exact or refused.
    """
    problem = _mistake(model, every, ranks, comm_type, keep, tp_size)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    models = model_types() if every else [model]
    with tqdm(total=len(models), unit="model", disable=len(models) == 1) as progress:

        def report(finding: Finding) -> None:
            progress.update()
            progress.set_postfix_str(f"{finding.name}: {finding.state}")
            if finding.state not in GOOD:
                progress.write(f"{finding.name}: {finding.state}: {finding.reason}", file=sys.stderr)

        if tp_size > 1:
            findings = survey_tensor_parallel(models, tp_size, jobs or default_jobs(), report)
        else:
            sizes = [2, 3, 4] if ranks is None else [int(size) for size in ranks.split(",")]
            findings = survey(models, sizes, {"comm_type": comm_type}, jobs or default_jobs(), report)
    print(table(findings))
    if keep and tp_size > 1:
        write_tensor_parallel(findings, KNOWN_TENSOR_PARALLEL)
    elif keep:
        write(findings, KNOWN, PAGE)
    return int(any(finding.state not in GOOD for finding in findings))


def _mistake(
    model: str | None, every: bool, ranks: str | None, comm_type: str, keep: bool, tp_size: int = 1
) -> str | None:
    """What is wrong with the arguments, if anything."""
    if every == (model is not None):
        return "give one MODEL_OR_TYPE, or --all."
    if ranks is not None and not all(size.strip().isdigit() and int(size) > 0 for size in ranks.split(",")):
        return f"--ranks={ranks!r} must be numbers of processes with commas between them, such as 2,3,4."
    if comm_type not in COMM_TYPES:
        return f"--comm={comm_type!r} is not one of {', '.join(COMM_TYPES)}."
    if tp_size > 1 and (ranks is not None or comm_type != "p2p"):
        return f"--tp={tp_size} compares CP groups of 2 by p2p: leave --ranks and --comm out."
    if keep and not (every and PAGE.parent.is_dir()):
        return f"--write goes with --all, in the project's folder: it writes {PAGE}."
    return None


def table(findings: list[Finding]) -> str:
    """One line a model: its state, the largest error of each kind of batch, and how its modules are computed."""
    kinds = list(dict.fromkeys(kind for finding in findings for kind in finding.errors))
    rows = [
        [
            finding.name,
            finding.state,
            *(f"{finding.errors[kind]:.0e}" if kind in finding.errors else "" for kind in kinds),
            how(vars(finding)),
        ]
        for finding in findings
    ]
    return tabulate(rows, ["model", "state", *kinds, "how"], maxcolwidths=[None] * (len(kinds) + 2) + [60])
