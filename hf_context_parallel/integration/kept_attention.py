"""Choice of the place where attention is kept under gradient checkpointing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..attention.kernels.registry import kernel_here
from ..cp_group import CPGroup
from ..distributed.free_memory import memory_of
from ..memory.advice import GIB, parts_with
from ..memory.facts import ModelFacts, facts_of_model, layers_of
from ..memory.job import Job

PLACES = ("device", "host", "off")
"""Places, from that with which a step is fastest to that with which it needs least memory."""
SHARE = 0.8
"""Share of a device's memory that a step may need by the model of memory, so that attention is kept."""


class Proposal(NamedTuple):
    """Place that a rank proposes: one of `PLACES`, and the reason where it was chosen for the user."""

    place: str
    reason: str = ""

    @property
    def number(self) -> int:
        """Number of the place, to be told to the other ranks."""
        return PLACES.index(self.place)


def proposed_place(
    model: PreTrainedModel, group: CPGroup, tokens: int, device: torch.device, checkpointed: bool
) -> Proposal:
    """Propose the place where this rank keeps attention.

    Args:
        model: the outermost model that is going to run.
        tokens: tokens of the whole batch.
        device: device of the batch.
        checkpointed: True if gradient checkpointing is on.
    """
    setting = group.config.attention_checkpoints
    if not checkpointed:
        return Proposal("off")
    if setting != "auto":
        return Proposal(setting)
    try:
        job, weights = job_of(model, group, tokens, device)
    except Exception as error:  # an estimate must not end a run
        return Proposal("off", f"the memory of {type(model).__name__} is not known ({error})")
    limit = SHARE * memory_of(device)
    place, needed = fitting_place(job, weights, limit, ("device", "host") if device.type == "cuda" else ("device",))
    return Proposal(
        place,
        f"a step of {tokens:,} tokens with kept attention needs {needed / GIB:.1f} GiB on a rank by the model of "
        f"memory, and may use {limit / GIB:.1f} GiB",
    )


def agreed_place(group: CPGroup, proposal: Proposal, numbers: Sequence[int]) -> str:
    """Return the place for all ranks, which is that of the rank with the least memory, and log it once.

    A rank that computes attention again waits for messages of the others, so all must keep it or none.

    Args:
        proposal: the proposal of this rank.
        numbers: the numbers of the proposals of all ranks.
    """
    place = PLACES[max(numbers)]
    if proposal.reason:
        reason = proposal.reason if place == proposal.place else "another rank has less memory"
        group.log_once(("attention_checkpoints", place), f"attention_checkpoints='auto' is {place!r}: {reason}")
    return place


def fitting_place(job: Job, weights: torch.dtype, limit: float, places: Sequence[str]) -> tuple[str, float]:
    """Return the first place with which a job fits into `limit` bytes, and the bytes of the job tried last.

    If none fits it is `"off"`.
    """
    needed = 0.0
    for place in places:
        needed = parts_with(replace(job, attention_checkpoints=place), weights).total
        if needed <= limit:
            return place, needed
    return "off", needed


def job_of(model: PreTrainedModel, group: CPGroup, tokens: int, device: torch.device) -> tuple[Job, torch.dtype]:
    """Describe a step of a model with gradient checkpointing and AdamW, and give the dtype of its weights.

    Raises:
        ValueError: if the layers of the model are not found.
    """
    facts, config = _facts_of(model), group.config
    # Outside of the forward of a layer FSDP2 has not gathered its weights, as it may have those of the outer model.
    layer = [x for x in layers_of(model)[0].parameters() if x.is_floating_point()]
    weights = layer[0].dtype if layer else model.dtype
    kind, tensor = device.type, group.groups.tensor.size
    job = Job(
        facts,
        tokens,
        cp=group.size,
        tp=tensor,
        fsdp=max(1, max(map(_shards, layer), default=1) // tensor),
        dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights,
        # Buffers of a ring are about as large as those of the strategy that "auto" or a list of layers may name.
        comm_type=config.comm_type if config.comm_type in ("all_gather", "a2a", "a2a+p2p") else "p2p",
        a2a_size=config.a2a_size or math.gcd(facts.key_heads, group.size),
        kernel=kernel_here(config.kernel) if kind == "cuda" else "cpu",
        tile_tokens=config.tile_tokens,
        head_groups=config.head_groups,
        loss_chunk_tokens=config.loss_chunk_tokens,
    )
    return job, weights


_facts: weakref.WeakKeyDictionary[PreTrainedModel, ModelFacts] = weakref.WeakKeyDictionary()


def _facts_of(model: PreTrainedModel) -> ModelFacts:
    """Return the facts of a model. They are read once, since that takes milliseconds, and each step asks for them."""
    if model not in _facts:
        _facts[model] = facts_of_model(model)
    return _facts[model]


def _shards(parameter: torch.nn.Parameter) -> int:
    """Count the ranks that share a parameter: by FSDP2 and tensor parallelism, or by ZeRO-3."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        return math.prod(mesh.size(place) for place, x in enumerate(parameter.placements) if not x.is_replicate())
    return dist.get_world_size() if hasattr(parameter, "ds_tensor") else 1
