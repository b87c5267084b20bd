"""Note on an error for want of memory: the largest part, and what would make it smaller."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ..memory.advice import advice
from ..memory.facts import facts_of
from ..memory.job import ATTENTION_CHECKPOINTS, Job

logger = logging.getLogger(__name__)

WORDS = ("not enough memory", "can't allocate memory")
"""What PyTorch says where memory of the CPU cannot be allocated."""


@contextmanager
def advised(trainer: Any) -> Iterator[None]:
    """Add a note to an error for want of memory. The error goes on as it is.

    No message is sent, as other ranks may be gone or in the middle of a step. Nothing is added for a model whose
    memory is not known.

    Args:
        trainer: a Trainer with our mixin.
    """
    try:
        yield
    except Exception as error:
        if is_of_memory(error):
            with suppress(Exception):  # whatever fails here must not hide the error
                _note(error, advice_of(trainer))
        raise


def is_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory cannot be allocated."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def advice_of(trainer: Any) -> str:
    """Advise on the run that a trainer has begun last."""
    job, weights, ranks = job_of(trainer)
    return advice(job, weights, ranks)


def job_of(trainer: Any) -> tuple[Job, torch.dtype, int]:
    """Describe the run that a trainer has begun last: the job, the dtype of its weights, and the data ranks."""
    args, config, model = trainer.args, trainer._config, trainer.model
    tokens, size = trainer._step_state.running
    weights = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    facts = facts_of(model.config)
    sizes = [(getattr(p, "ds_numel", None) or p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(count for count, is_trained in sizes if is_trained)
    if trained < sum(count for count, _ in sizes):
        facts = replace(facts, lora_parameters=trained)
    tp = trainer.cp.groups.tensor.size
    ranks = args.world_size // tp
    wrapped = any(isinstance(module, FSDPModule) for module in model.modules())  # maybe while it was loaded
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or wrapped
    comm_type = config.comm_type if isinstance(config.comm_type, str) and config.comm_type != "auto" else "p2p"
    kept = getattr(config, "attention_checkpoints", "off")
    options = args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {}
    job = Job(
        facts,
        tokens,
        cp=size,
        tp=tp,
        fsdp=ranks if sharded else 1,
        ddp=not sharded and ranks > 1,
        dtype=torch.bfloat16 if args.bf16 or args.fp16 else weights,
        comm_type=comm_type,
        a2a_size=config.a2a_size or math.gcd(facts.key_heads, size),
        kernel="torch" if args.device.type == "cuda" else "cpu",
        checkpointing=bool(args.activation_checkpointing or args.gradient_checkpointing),
        offload=bool(isinstance(options, dict) and options.get("offload")),
        attention_checkpoints=kept if kept in ATTENTION_CHECKPOINTS else "off",
        tile_tokens=getattr(config, "tile_tokens", None),
        loss_chunk_tokens=config.loss_chunk_tokens,
        optimizer="sgd" if args.optim == "sgd" else "adamw",
        accumulates=args.gradient_accumulation_steps > 1,
        sharded=getattr(config, "tile_tokens", None) is not None,
    )
    return job, weights, ranks


def _note(error: BaseException, text: str) -> None:
    """Add a note to an error, or log it where Python has no notes yet."""
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:
        logger.error(text)
