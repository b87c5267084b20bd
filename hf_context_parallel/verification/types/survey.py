"""Survey of model types: findings of `check`, kept in models.json and multimodal.json and shown in docs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from transformers import AutoModelForCausalLM

from ...compat import causal_lm_classes, masked_lm_classes
from ...distributed.worker_pool import WorkerPool
from ...integration.model_registry import NOT_MADE, REFUSED
from .check import Errors, errors_of, tolerance
from .media import UNTESTED, media_types
from .tiny import configuration

TIMEOUT = 120
"""Seconds that a model may take on a group of one size."""
WITH_SEQUENCE_PARALLEL = " (sequence parallel)"
GOOD = ("exact", "exact by resharding", "refused")


_REFUSAL = "ValueError: "


@dataclass
class Finding:
    """Result of the check of one model.

    Args:
        name: the model type, or the folder or hub id that was checked.
        state: "exact"; "exact by resharding" if modules see whole sequences; "refused"; or "wrong".
        errors: for each kind of batch, the largest error of loss and gradients.
        handled: for each class of modules that mix tokens, the ways it was computed.
        reason: the reason of a refusal, or of a wrong result.
        by_processor: the image processor of the type made the images of the batches.
    """

    name: str
    state: str
    errors: dict[str, float] = field(default_factory=dict)
    handled: dict[str, list[str]] = field(default_factory=dict)
    reason: str = ""
    by_processor: bool = False


def model_types(media: bool = False) -> list[str]:
    """List the types of all causal and masked language models of the installed Transformers, or those with media."""
    return media_types() if media else sorted({*causal_lm_classes(), *masked_lm_classes()})


def survey(
    models: Sequence[str],
    ranks: Sequence[int],
    settings: dict[str, Any],
    jobs: int,
    report: Callable[[Finding], None],
    tp_size: int = 1,
    trust_remote_code: bool = False,
    module: str | None = None,
    media: bool = False,
) -> list[Finding]:
    """Check several models, and return their findings in the same order.

    Args:
        models: model types, folders or hub ids.
        ranks: the sizes of the CP groups.
        settings: further keywords of `ContextParallelConfig`.
        jobs: models to check at a time.
        report: a function that is called with each finding as soon as there is one.
        tp_size: the number of ranks that share each layer.
        trust_remote_code: run the code that comes with a model.
        module: a module that registers models, which all processes import.
        media: give the models images, video and sound.
    """
    if not models:
        return []
    pools = [WorkerPool(max(ranks) * tp_size, TIMEOUT) for _ in range(min(jobs, len(models)))]
    free = list(pools)

    def one(model: str) -> Finding:
        pool = free.pop()
        try:
            return examine(pool, model, ranks, settings, tp_size, trust_remote_code, module, media)
        finally:
            free.append(pool)

    try:
        with ThreadPoolExecutor(len(pools)) as executor:
            futures = {executor.submit(one, model): model for model in models}
            findings = {}
            for future in as_completed(futures):
                findings[futures[future]] = future.result()
                report(future.result())
    finally:
        for pool in pools:
            pool.close()
    return [findings[model] for model in models]


def examine(
    pool: WorkerPool,
    model: str,
    ranks: Sequence[int],
    settings: dict[str, Any],
    tp_size: int = 1,
    trust_remote_code: bool = False,
    module: str | None = None,
    media: bool = False,
) -> Finding:
    """Check one model on groups of each size in `ranks`; see `survey`."""
    refused = {**REFUSED, **UNTESTED} if media else REFUSED
    if model in refused:
        return Finding(model, "refused", reason=refused[model])
    try:
        config = configuration(model, trust_remote_code, module)
    except Exception as error:  # the checks of a configuration raise errors of many kinds
        return Finding(model, "wrong", reason=f"{NOT_MADE}: {last_line(error)}")
    if config.model_type in REFUSED:
        return Finding(model, "refused", reason=REFUSED[config.model_type])
    worst: dict[str, float] = {}
    handled: dict[str, list[str]] = {}
    by_processor = False
    for size in ranks:
        try:
            asked = model, settings, tp_size, trust_remote_code, module, media
            found, handled, by_processor = pool(size * tp_size, errors_of, *asked)[0]
        except AssertionError as error:
            line = last_line(error)
            if media and _is_refusal(error):
                return Finding(model, "refused", reason=line.removeprefix(_REFUSAL))
            return Finding(model, "wrong", worst, handled, f"on {size} ranks: {line}")
        for kind, of_kind in found.items():
            error = max(of_kind.loss, of_kind.gradients, key=_nan_first)
            if not error <= tolerance(config):
                return Finding(model, "wrong", worst | {kind: error}, handled, _wrong(size, kind, of_kind))
            worst[kind] = max(worst.get(kind, 0.0), error)
    whole = any("whole sequences" in how for how in handled.values())
    return Finding(model, "exact by resharding" if whole else "exact", worst, handled, by_processor=by_processor)


def survey_tensor_parallel(
    models: Sequence[str],
    tp_size: int,
    jobs: int,
    report: Callable,
    trust_remote_code: bool = False,
    module: str | None = None,
) -> list[Finding]:
    """Check the models that have a tensor-parallel plan, and the exact ones with sequence parallelism as well."""
    code = trust_remote_code, module
    planned = [model for model in models if _has_plan(model, *code)]
    findings = survey(planned, [2], {"comm_type": "p2p", "sequence_parallel": False}, jobs, report, tp_size, *code)
    exact = [finding.name for finding in findings if finding.state in GOOD]  # the others are refused anyway
    more = survey(exact, [2], {"comm_type": "p2p", "sequence_parallel": True}, jobs, report, tp_size, *code)
    for finding in more:
        finding.name += WITH_SEQUENCE_PARALLEL
        if "sequence_parallel=True: " in finding.reason:  # the model refuses it by itself
            finding.state = "refused"
    return sorted(findings + more, key=lambda finding: finding.name)


def _has_plan(model: str, trust_remote_code: bool, module: str | None) -> bool:
    if model in REFUSED:
        return False
    with torch.device("meta"):
        config = configuration(model, trust_remote_code, module)
        return bool(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).tp_plan)


def write_tensor_parallel(findings: Iterable[Finding], known: Path) -> None:
    """Write the findings with tensor parallelism to the file of the package."""
    types: dict[str, dict[str, str]] = {}
    for finding in findings:
        name = finding.name.removesuffix(WITH_SEQUENCE_PARALLEL)
        exact = finding.state in GOOD
        if name == finding.name:
            types[name] = {"state": "exact" if exact else "refused", "reason": finding.reason}
        elif types[name]["state"] == "exact":
            types[name]["sequence_parallel"] = "exact" if finding.state == "exact" else "refused"
    known.write_text(json.dumps({"transformers": transformers.__version__, "types": types}, indent=1) + "\n")


def _wrong(size: int, kind: str, found: Errors) -> str:
    return (
        f"on {size} ranks, {kind}: loss off by {found.loss:.0e}, gradients by {found.gradients:.0e} "
        f"({found.parameter})"
    )


def _is_refusal(error: BaseException) -> bool:
    """Return whether this package raised the ValueError in a worker's traceback, and not the model or its batch."""
    places = [line for line in str(error).splitlines() if line.strip().startswith("File ")]
    ours = bool(places) and "hf_context_parallel" in places[-1] and "verification" not in places[-1]
    return ours and last_line(error).startswith(_REFUSAL)


def _nan_first(value: float) -> tuple[bool, float]:
    return value != value, value


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, which may hold a worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def write(findings: Iterable[Finding], known: Path, page: Path, media: bool = False) -> None:
    """Write the findings of all types to the file of the package, and as a page of the documentation."""
    kept = {finding.name: asdict(finding) for finding in findings}
    for finding in kept.values():
        del finding["name"]
        if not finding["by_processor"]:
            del finding["by_processor"]
        finding["reason"] = finding.pop("reason")  # at the end
        finding["errors"] = {kind: bound(error) for kind, error in finding["errors"].items()}
        if finding["state"] == "wrong":
            finding |= {"state": "refused", "errors": {}, "handled": {}}
    content = {"transformers": transformers.__version__, "types": kept}
    known.write_text(json.dumps(content, indent=1) + "\n")
    page.write_text(page_of(content, media))


def bound(error: float) -> float:
    """Round an error up to a power of ten, since rounding differs between machines."""
    power = 1e-15
    while power < error:
        power = float(f"{power * 10:.0e}")
    return power


_TEXT_ALONE = """\
This page is made by `hf-context-parallel check --all --write`. A tiny model of each type, with random
weights in float64, runs on groups of 2, 3 and 4 processes. It is compared with the same model on one
process, with Transformers' own attention and each document of a packed batch alone. The numbers bound
the largest difference of the loss and of every parameter's gradient, relative to the largest entry of
the tensor."""
_WITH_MEDIA = """\
This page is made by `hf-context-parallel check --all --vlm --write`. A tiny model of each type, with random
weights in float64, runs on groups of 2, 3 and 4 processes. It is compared with the same model on one
process, with Transformers' own attention and each document of a packed batch alone. The numbers bound
the largest difference of the loss and of every parameter's gradient, relative to the largest entry of
the tensor; those of towers and projectors are among them.

Rows have several images, of two sizes where a type takes such, and one row has none. Images lie across the
borders of shards. Padded and packed batches have images, or else sounds or videos, too. The auxiliary loss
of a router is compared for padded rows, with the types that compute one."""


def page_of(content: dict, media: bool = False) -> str:
    """Build the text of docs/models.md, or of docs/multimodal.md."""
    types = content["types"]
    counts = {state: sum(finding["state"] == state for finding in types.values()) for state in GOOD}
    kinds = list(dict.fromkeys(kind for finding in types.values() for kind in finding["errors"]))
    rows = [
        [name, finding["state"], *(_shown(finding["errors"].get(kind)) for kind in kinds), how(finding)]
        for name, finding in types.items()
    ]
    subject = "image-text and audio-text model" if media else "causal or masked language model"
    return "\n".join(
        [
            "# Models with images, video and sound" if media else "# Models",
            "",
            f"Every {subject} of Transformers {content['transformers']}: {len(types)} types, "
            + ", ".join(f"{count} {state}" for state, count in counts.items())
            + ".",
            "",
            _WITH_MEDIA + _processors(types) if media else _TEXT_ALONE,
            "",
            "- **exact**: attention is a ring; other mixers, if any, share their heads or exchange halos.",
            "- **exact by resharding**: the modules marked *whole sequences* see each sequence whole, on one rank.",
            "- **refused**: a model of this type raises the reason when it runs on shards"
            + (", or cannot be built or trained on one process." if media else "."),
            "",
            tabulate(rows, ["type", "state", *kinds, "how"], tablefmt="github"),
            "",
        ]
    )


def _processors(types: dict[str, dict]) -> str:
    """Say for how many types a processor made the images."""
    count = sum(finding.get("by_processor", False) for finding in types.values())
    return (
        f"\n\nThe image processors of {count} types made their images from noise, by Pillow. Other images, videos\n"
        "and sounds are random tensors of the right shapes."
    )


def _shown(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"


def how(finding: dict) -> str:
    """Describe the ways in which the modules of a type are computed, or the reason of its refusal."""
    if finding["reason"]:
        return finding["reason"]
    return "; ".join(f"{name}: {', '.join(ways)}" for name, ways in sorted(finding["handled"].items()))


def default_jobs() -> int:
    """Return the number of models to check at a time: half the number of cores, but at least 2.

    Together they start more ranks than there are cores, which is faster, since ranks often wait for each other.
    """
    return max(2, (os.cpu_count() or 2) // 2)
