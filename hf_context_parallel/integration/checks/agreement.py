"""Agreement of a group's ranks before they compute a batch: on the model, and on a sample of its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...cp_group import CPGroup
from ...distributed.process_groups import Groups
from .weights import sampled_parameters, weights_differ

SAME_BATCHES = (
    "All ranks of a CP group must be given the same: use cp.prepare_data_loader() or ContextParallelTrainer, which "
    "deal samples to CP groups rather than ranks."
)


def check_weights(compared: Sequence[torch.nn.Parameter], groups: Groups) -> None:
    """Refuse parameters that are not the same on all ranks of the group. Every rank must call this, with as many.

    Raises:
        ValueError: on every rank alike.
    """
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
