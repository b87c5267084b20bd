"""Command `hf-context-parallel check`, which shows progress and prints a table."""

from __future__ import annotations

import sys
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from hf_context_parallel.config import COMM_TYPES
from hf_context_parallel.integration.model_registry import KNOWN, KNOWN_MULTIMODAL, KNOWN_TENSOR_PARALLEL
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
PAGE_MULTIMODAL = Path("docs/multimodal.md")


def run_check(
    model: str | None,
    every: bool,
    ranks: str | None,
    comm_type: str,
    jobs: int | None,
    keep: bool,
    tp_size: int = 1,
    trust_remote_code: bool = False,
    module: str | None = None,
    media: bool = False,
) -> int:
    """Check one model or all model types, and print a table of the findings.

    Args:
        model: a model type, a folder or a hub id; None with `every`.
        every: check all causal and masked language models of Transformers.
        ranks: sizes of the CP groups, separated by commas. By default 2, 3 and 4.
        comm_type: the `comm_type` of `ContextParallelConfig`.
        jobs: models to check at a time. By default `default_jobs()`.
        keep: write the findings into the package and its documentation.
        tp_size: ranks of tensor parallelism.
        trust_remote_code: run the code that comes with the model.
        module: a module that registers the model.
        media: give models images, video and sound; with `every`, check all types that take them instead.

    Returns:
        The exit status: 0 if everything is exact or refused, 1 if a model is wrong, 2 if an argument is.
    """
    problem = _mistake(model, every, ranks, comm_type, keep, tp_size, media)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    models = model_types(media) if every else [model]
    with tqdm(total=len(models), unit="model", disable=len(models) == 1) as progress:

        def report(finding: Finding) -> None:
            progress.update()
            progress.set_postfix_str(f"{finding.name}: {finding.state}")
            if finding.state not in GOOD:
                progress.write(f"{finding.name}: {finding.state}: {finding.reason}", file=sys.stderr)

        if tp_size > 1:
            how = jobs or default_jobs(), report, trust_remote_code, module
            findings = survey_tensor_parallel(models, tp_size, *how)
        else:
            sizes = [2, 3, 4] if ranks is None else [int(size) for size in ranks.split(",")]
            settings = {"comm_type": comm_type}
            code = trust_remote_code, module
            findings = survey(models, sizes, settings, jobs or default_jobs(), report, 1, *code, media)
    print(table(findings))
    if keep and tp_size > 1:
        write_tensor_parallel(findings, KNOWN_TENSOR_PARALLEL)
    elif keep:
        write(findings, KNOWN_MULTIMODAL if media else KNOWN, PAGE_MULTIMODAL if media else PAGE, media)
    return int(any(finding.state not in GOOD for finding in findings))


def _mistake(
    model: str | None,
    every: bool,
    ranks: str | None,
    comm_type: str,
    keep: bool,
    tp_size: int = 1,
    media: bool = False,
) -> str | None:
    """Describe the first wrong argument, or return None."""
    if every == (model is not None):
        return "MODEL_OR_TYPE and --all are both given or both missing. Give one MODEL_OR_TYPE, or --all."
    if ranks is not None and not all(size.strip().isdigit() and int(size) > 0 for size in ranks.split(",")):
        return f"--ranks={ranks!r} is not a list of positive numbers. Give numbers separated by commas, such as 2,3,4."
    if comm_type not in COMM_TYPES:
        return f"--comm={comm_type!r} is not one of {', '.join(COMM_TYPES)}. Give one of them."
    if tp_size > 1 and (ranks is not None or comm_type != "p2p"):
        return f"--tp={tp_size} always compares CP groups of 2 by p2p. Leave --ranks and --comm out."
    if tp_size > 1 and media:
        return f"--tp={tp_size} compares text alone. Leave --vlm out."
    if keep and not (every and PAGE.parent.is_dir()):
        return f"--write needs --all, and the project's folder to write {PAGE}. Add --all and change to that folder."
    return None


def table(findings: list[Finding]) -> str:
    """Format a table with a line for each model: state, largest error of each kind of batch, and ways of computing."""
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
