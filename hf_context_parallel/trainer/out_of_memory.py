"""Note on an error for want of memory: the largest part, and what would make it smaller."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ..integration.border.parallelize import borders_of
from ..integration.kept_attention import job_of as job_of_model
from ..integration.model_registry import transformers_model
from ..memory.advice import advice
from ..memory.job import Job

logger = logging.getLogger(__name__)

WORDS = ("not enough memory", "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Words of PyTorch's errors where memory of the CPU, or of a library on the device, cannot be allocated."""


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
    args, model = trainer.args, transformers_model(trainer.model)
    tokens, size = trainer._step_state.running
    job, weights = job_of_model(model, trainer.cp.group, tokens, args.device)
    ranks = args.world_size // job.tp
    wrapped = any(isinstance(module, FSDPModule) for module in model.modules())  # maybe while it was loaded
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or wrapped
    # Transformers has the first name since 5.24.
    names = [name for name in ("activation_checkpointing", "gradient_checkpointing") if getattr(args, name, False)]
    options = [getattr(args, f"{name}_kwargs", None) or {} for name in names]
    job = replace(
        job,
        cp=size,
        fsdp=ranks if sharded else 1,
        ddp=not sharded and ranks > 1,
        dtype=torch.bfloat16 if args.bf16 or args.fp16 else weights,
        checkpointing=bool(names),
        offload=any(isinstance(each, dict) and bool(each.get("offload")) for each in options),
        attention_checkpoints=next((x.attention_checkpoints for x in borders_of(trainer.model)), "off"),
        optimizer="sgd" if args.optim == "sgd" else "adamw",
        accumulates=args.gradient_accumulation_steps > 1,
    )
    return job, weights, ranks


def _note(error: BaseException, text: str) -> None:
    """Add a note to an error, or log it where Python has no notes yet."""
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:
        logger.error(text)
