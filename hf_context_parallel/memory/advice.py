"""Advice on a job that does not fit: its largest part, and what would make it smaller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..attention.heads import most_groups
from .job import Job
from .parts import Parts, parts_of

GIB = 2**30
TILE = 2048
"""Tokens of a tile that is proposed."""
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "states of the optimizer",
    "checkpoints": "inputs of layers, kept for backward",
    "attention": "outputs of attention, kept for backward",
    "layer": "working set of a layer",
    "messages": "buffers of keys/values and their gradients",
    "loss": "logits and what the loss needs",
    "tower": "images: pixels, the vision tower, features",
}
"""Names of the parts of memory, in words."""


def parts_with(job: Job, weights: torch.dtype) -> Parts:
    """Count the bytes of a job whose weights, gradients and states of the optimizer have the dtype `weights`."""
    parts = parts_of(job)
    if weights == job.dtype:
        return parts
    wide = parts_of(replace(job, dtype=weights)).phases
    phases = {
        name: replace(
            phase,
            weights=wide[name].weights,
            gradients=wide[name].gradients,
            optimizer=wide[name].optimizer,
        )
        for name, phase in parts.phases.items()
    }
    return replace(parts, phases=phases)


def by_size(parts: Parts) -> list[tuple[str, float]]:
    """List the parts at the peak in words, each with its bytes, the largest first."""
    found = [(words, float(getattr(parts.at_peak, name))) for name, words in PARTS.items()]
    return sorted(found, key=lambda part: -part[1])


def gib(size: float) -> str:
    """Format bytes in GiB."""
    return f"{size / GIB:.1f}"


def advice(job: Job, weights: torch.dtype, ranks: int) -> str:
    """Tell the largest part of a job, and what would make its peak smaller, the most first.

    Args:
        weights: dtype of weights, gradients and states of the optimizer.
        ranks: data ranks, of which CP groups and FSDP are made.
    """
    parts = parts_with(job, weights)
    (largest, size), *_ = by_size(parts)
    smaller = {words: parts_with(changed, weights).total for words, changed in _changes(job, ranks)}
    helping = sorted((total, words) for words, total in smaller.items() if total < parts.total)
    lines = [
        f"By the model of memory, a step of {job.tokens:,} tokens on {job.cp} CP ranks needs {gib(parts.total)} GiB "
        f"on a rank at its peak ({parts.peak}). The largest part of it: {largest}, {gib(size)} GiB.",
        *(f"  {gib(total)} GiB with {words}" for total, words in helping),
        "`hf-context-parallel plan` lists what fits.",
    ]
    return "\n".join(lines)


def _changes(job: Job, ranks: int) -> Iterator[tuple[str, Job]]:
    """List changes of a job, one at a time."""
    if not job.checkpointing:
        yield "gradient_checkpointing=True", replace(job, checkpointing=True)
    elif not job.offload:
        yield "gradient_checkpointing_kwargs={'offload': True}", replace(job, offload=True)
    for place in ("host", "off"):
        if job.keeps_attention and job.attention_checkpoints != place:
            yield f"attention_checkpoints={place!r}", replace(job, attention_checkpoints=place)
    most = most_groups(job.shape.key_heads, job.inner)
    if job.groups < most and not job.is_alone:
        yield f"head_groups={most}", replace(job, head_groups=most)
    if job.mlp_tokens > TILE:
        yield f"tile_tokens={TILE}", replace(job, tile_tokens=TILE)
    if ranks % (2 * job.cp) == 0:
        yield f"context_parallel.size={2 * job.cp}", replace(job, cp=2 * job.cp)
    if job.fsdp == 1 and ranks > 1:
        yield f"FSDP2 over the {ranks} data ranks", replace(job, fsdp=ranks, ddp=False)
