"""Agreement of the ranks of a group on the model and on a sample of its weights, before they compute a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...compat import tree_leaves
from ...cp_group import CPGroup
from ...distributed.host import at_hand, on_host
from ...distributed.process_groups import Groups
from .weights import sampled_parameters, weights_differ

SAME_BATCHES = (
    "Give all ranks of a CP group the same batch and model: cp.prepare_data_loader() and ContextParallelTrainer deal "
    "samples to CP groups rather than ranks."
)


SAMPLED = 1024
"""Number of values of a tensor that ranks compare."""


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


def sample(given: Mapping[str, Any], group: CPGroup) -> dict[str, Any]:
    """Return what the ranks compare of arguments of the model around a decoder, such as pixels.

    These are shapes and dtypes of all tensors, all tokens, and values of other tensors that the host has.
    """
    leaves = {name: [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)] for name, value in given.items()}
    found: dict[str, Any] = {}
    for name, tensors in leaves.items():
        for number, x in enumerate(tensors):
            found[f"{name} {number}"] = str(x.dtype), tuple(x.shape)
            values = on_host(x) if name == "input_ids" else at_hand(x)
            if group.config.check_batch and values is not None:
                stride = 1 if name == "input_ids" else max(1, x.numel() // SAMPLED)
                found[f"values of {name} {number}"] = values.flatten()[::stride]
    return found


def signature(model: torch.nn.Module) -> tuple:
    """Return the properties of a model that must be equal on all ranks."""
    parameter = next(model.parameters(), None)
    return type(model).__name__, model.training, None if parameter is None else str(parameter.dtype)
