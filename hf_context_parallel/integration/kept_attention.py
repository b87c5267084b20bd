"""Choice of the place where attention is kept under gradient checkpointing, for `attention_checkpoints="auto"`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..attention.kernels.registry import kernel_here
from ..cp_group import CPGroup
from ..memory.advice import GIB, parts_with
from ..memory.facts import facts_of_model, number_of
from ..memory.job import Job
from .outer_call import outer_call

SHARE = 0.8
"""Share of a device's memory that a step may need by the model of memory, so that attention is kept."""


def place_of_attention(decoder: PreTrainedModel, group: CPGroup, tokens: int, checkpointed: bool) -> str:
    """Return where attention is kept: `"off"`, `"device"` or `"host"`.

    All ranks of the group must call this alike. They choose the same place, since they choose by the same numbers.

    Args:
        decoder: the decoder that is going to run.
        tokens: tokens of the whole batch.
        checkpointed: True if gradient checkpointing is on.
    """
    setting = group.config.attention_checkpoints
    if setting != "auto" or not checkpointed:
        return setting if checkpointed else "off"
    call = outer_call()
    model, device = decoder if call is None else call.model, next(decoder.parameters()).device
    try:
        job, weights = job_of(model, group, tokens)
    except (AttributeError, ValueError) as error:
        return _logged(group, "off", f"the memory of {type(model).__name__} is not known ({error})")
    limit = SHARE * group.memory(device)
    place, needed = fitting_place(job, weights, limit, ("device", "host") if device.type == "cuda" else ("device",))
    return _logged(
        group,
        place,
        f"a step of {tokens:,} tokens with kept attention needs {needed / GIB:.1f} GiB on a rank by the model of "
        f"memory, and may use {limit / GIB:.1f} GiB",
    )


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


def job_of(model: PreTrainedModel, group: CPGroup, tokens: int) -> tuple[Job, torch.dtype]:
    """Describe a step of a model with gradient checkpointing and AdamW, and give the dtype of its weights.

    Raises:
        ValueError: if the layers of the model are not found.
    """
    facts, config = facts_of_model(model), group.config
    parameters = list(model.parameters())
    whole, here = sum(map(number_of, parameters)), sum(map(_here, parameters))
    weights, device = model.dtype, parameters[0].device.type
    tensor = group.groups.tensor.size
    job = Job(
        facts,
        tokens,
        cp=group.size,
        tp=tensor,
        fsdp=max(1, round(whole / max(1, here) / tensor)),
        dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights,
        # Buffers of a ring are about as large as those of the strategy that "auto" or a list of layers may name.
        comm_type=config.comm_type if config.comm_type in ("all_gather", "a2a", "a2a+p2p") else "p2p",
        a2a_size=config.a2a_size or math.gcd(facts.key_heads, group.size),
        kernel=kernel_here(config.kernel) if device == "cuda" else "cpu",
        tile_tokens=config.tile_tokens,
        loss_chunk_tokens=config.loss_chunk_tokens,
    )
    return job, weights


def _logged(group: CPGroup, place: str, reason: str) -> str:
    """Log a choice once, and return it."""
    group.log_once(("attention_checkpoints", place), f"attention_checkpoints='auto' is {place!r}: {reason}")
    return place


def _here(parameter: torch.nn.Parameter) -> int:
    """Return the numbers of a parameter that this rank holds. FSDP2 and ZeRO-3 shard parameters."""
    part = parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
    return part.numel()
