"""Agreement of a group's ranks before they compute a batch: on the batch, the model, and a sample of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...cp_group import CPGroup
from ...distributed.agreement import agree, fingerprint
from ...distributed.process_groups import Groups
from .weights import sampled_parameters, weights_differ


def check_agreement(
    groups: Groups, error: Exception | None, about: Mapping[str, object], compared: Sequence[torch.nn.Parameter]
) -> None:
    """Raise on every rank alike unless all go on with the same batch and model. Every rank must call this.

    Args:
        error: what went wrong on this rank, if anything.
        about: what the ranks must have in common, with how many parameters are compared.
        compared: parameters that must have the same values.

    Raises:
        ValueError: if a rank had an error, or batches, models or weights differ.
    """
    agree(
        groups.same_batch,
        error,
        fingerprint(about),
        "batches or models",
        "All ranks of a CP group must be given the same: use cp.prepare_data_loader() or "
        "ContextParallelTrainer, which deal samples to CP groups rather than ranks.",
    )
    if weights_differ(compared, groups):
        raise ValueError(
            "the ranks of the group have different weights, and what they compute together would be of no "
            "model. Give all ranks the same to begin with (seed them alike before the model is made, or load "
            "it), and sum gradients over all ranks before each step of the optimizer. DistributedDataParallel "
            "and ContextParallelTrainer do both."
        )


def sampled(model: torch.nn.Module, group: CPGroup) -> list[torch.nn.Parameter]:
    """The parameters that the ranks compare."""
    groups = group.groups
    # Beside tensor parallelism, ranks have weights of their own.
    if not group.config.check_batch or groups.size == 1 or groups.same_batch.size > groups.size:
        return []
    return sampled_parameters(model)


def signature(model: torch.nn.Module) -> tuple:
    """What all ranks' models must have in common."""
    parameter = next(model.parameters(), None)
    return type(model).__name__, model.training, None if parameter is None else str(parameter.dtype)
