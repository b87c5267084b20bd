"""Checks of models with images, video and sound on two processes that share one GPU, over gloo.

In float64 they are compared with the same model on one process. In bfloat16 their errors are those of rounding: at
most a few times the errors of one process with stock attention.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

import hf_context_parallel as hcp
from hf_context_parallel.data.batch import IGNORED
from hf_context_parallel.integration.switches import allow_unchecked_models
from hf_context_parallel.verification.types.check import Case, unrounded
from hf_context_parallel.verification.types.tiny import tiny_config

from .models import OF_STOCK, of_all
from .processes import RANKS, Tell, on_ranks

TYPES = ("gemma3", "qwen3_vl", "qwen2_5_vl", "internvl", "qwen3_5", "qwen2_audio")
EXACT = 1e-7
"""Largest error of the loss, or of a gradient relative to its largest entry, in float64."""
LEAST = 1e-6
"""Largest entry that a gradient counts as having at least. Some gradients are 0 but for rounding."""
Step = tuple[torch.Tensor, list[torch.Tensor]]
"""Loss of a step, and the gradients of all parameters."""


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    return on_ranks(compared, options.device)


def compared(folder: str, device: str, tell: Tell) -> None:
    """Run the comparisons of one rank."""
    small = device == "cpu"
    for model_type in TYPES[:1] if small else TYPES:
        case = Case(tiny_config(model_type), media=True)
        with torch.random.fork_rng():
            batches = case.batches()
        for kind in [kind for kind in batches if kind in ("images", "video", "audio", "packed")][: 1 if small else 4]:
            tell(of_batch(case, kind, torch.device(device)))


def of_batch(case: Case, kind: str, device: torch.device) -> dict[str, Any]:
    """Compare one batch of a type, in float64 with the reference kernel, and in bfloat16 with the default one."""
    what = f"{case.config.model_type}, {kind}"
    truth = step(case, kind, None, torch.float64, device)
    error = worst(step(case, kind, "reference" if device.type == "cuda" else "auto", torch.float64, device), truth)
    result = {"what": what, "right": error <= EXACT, "error": error}
    if device.type == "cuda":
        stock = whole(step(case, kind, None, torch.bfloat16, device), truth)
        rounded = whole(step(case, kind, "auto", torch.bfloat16, device), truth)
        result |= {"bfloat16": rounded, "stock's bfloat16": stock}
        result["right"] &= rounded <= OF_STOCK * stock
    return result


def step(case: Case, kind: str, kernel: str | None, dtype: torch.dtype, device: torch.device) -> Step:
    """Compute loss and gradients: with a kernel on the ranks, or without on this process.

    Gradients of the ranks are averaged.
    """
    batch = case.batches()[kind]
    model = case.model(None if kernel is None else "context_parallel").to(device, dtype)
    if kernel is not None:
        cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=RANKS, kernel=kernel))
        with allow_unchecked_models():
            model = hcp.parallelize(model, cp)
    parts = batch.parts if kernel is None else [batch.inputs]
    counts = [(part["labels"][:, 1:] != IGNORED).sum().item() for part in parts]
    total = torch.zeros((), dtype=torch.float64, device=device)
    with unrounded(case.config) if dtype == torch.float64 else nullcontext():
        for part, count in zip(parts, counts):
            if count:
                moved = {name: to(value, device, dtype) for name, value in part.items()}
                loss = model(**moved, **({"use_cache": False} if kernel is None else {})).loss * count / sum(counts)
                loss.backward()
                total += loss.detach()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in model.parameters()]
    if kernel is not None:
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= RANKS
    return total, [gradient.double() for gradient in gradients]


def to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a tensor, or the tensors of a list. Numbers that are no integers get the dtype."""
    if isinstance(value, (list, tuple)):
        return type(value)(to(item, device, dtype) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def worst(found: Step, truth: Step) -> float:
    """Largest error of the loss and of the gradients, each relative to its largest entry."""
    pairs = [(found[0], truth[0]), *zip(found[1], truth[1])]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=LEAST)).item() for a, b in pairs)


def whole(found: Step, truth: Step) -> float:
    """Relative error of all gradients together, or of the loss if that is larger."""
    return of_all(list(zip(found[1], truth[1])), found[0], truth[0])
