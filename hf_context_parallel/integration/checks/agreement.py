"""Agreement of the ranks of a group on the model and on a sample of its weights, before they compute a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...cp_group import CPGroup
from ...distributed.process_groups import Groups
from .weights import sampled_parameters, weights_differ

SAME_BATCHES = (
    "Give all ranks of a CP group the same batch and model: cp.prepare_data_loader() and ContextParallelTrainer deal "
    "samples to CP groups rather than ranks."
)


def check_weights(compared: Sequence[torch.nn.Parameter], groups: Groups) -> None:
    """Refuse parameters that are not the same on all ranks of the group.

    Every rank must call this, with the same number of parameters.

    Raises:
        ValueError: on every rank alike.
    """
    if weights_differ(compared, groups):
        raise ValueError(
            "the ranks of the group have different weights, so together they would compute no single model. Seed all "
            "ranks alike before the model is made, or load it, and reduce gradients over all ranks before each step "
            "of the optimizer; DistributedDataParallel and ContextParallelTrainer do both."
        )


def sampled(model: torch.nn.Module, group: CPGroup) -> list[torch.nn.Parameter]:
    """Return the parameters that the ranks compare; none where they are not to be compared."""
    groups = group.groups
    # With tensor parallelism, ranks hold different parts of the weights.
    if not group.config.check_batch or groups.size == 1 or groups.same_batch.size > groups.size:
        return []
    return sampled_parameters(model)


def signature(model: torch.nn.Module) -> tuple:
    """Return the properties of a model that must be equal on all ranks."""
    parameter = next(model.parameters(), None)
    return type(model).__name__, model.training, None if parameter is None else str(parameter.dtype)
