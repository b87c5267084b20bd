"""Agreement of the ranks of a group on the model and on a sample of its weights, before they compute a batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ...compat import tree_leaves
from ...cp_group import CPGroup
from ...data.batch import SHARD
from ...distributed.agreement import collective
from ...distributed.host import at_hand, on_host
from .weights import (
    compare_all,
    compared_parameters,
    different_weights,
    refuse_difference,
    refuse_non_finite,
    sampled_parameters,
    weights_differ,
)

SAME_BATCHES = (
    "Give all ranks of a CP group the same batch and model: cp.prepare_data_loader() and ContextParallelTrainer deal "
    "samples to CP groups rather than ranks."
)


CLASS, MODE, DTYPE = "the class of the model", "the mode of the model", "the dtype of the model"
REMEDIES = {
    CLASS: "Make or load the same model on all ranks of a CP group.",
    MODE: "Call model.train(), or model.eval(), on all ranks of a CP group alike.",
    DTYPE: "Load the model with the same dtype on all ranks of a CP group: from_pretrained(..., dtype=...).",
}
"""Remedies for different models on the ranks, by what differs."""

PLANNED = ("position_ids", "attention_mask", "cu_seq_lens_q")
"""Names of inputs that plans depend on, whose values are always compared."""
SAMPLED = 1024
"""Number of values of a tensor that ranks compare."""


def check_weights(model: torch.nn.Module, compared: Mapping[str, torch.nn.Parameter], group: CPGroup) -> None:
    """Refuse a model whose weights are not the same on all ranks of the group, or are not finite.

    All parameters are compared the first time that the group computes the model, and a sample of them afterwards.
    Every rank must call this, with the same number of parameters.

    Args:
        compared: the sample.

    Raises:
        ValueError: on every rank alike.
    """
    if not compared:
        return
    # Ranks that share layers wait for each other too, and one of their CP groups may find what others do not.
    with collective(group.groups.same_batch) if group.groups.same_batch.size > group.groups.size else nullcontext():
        _check_weights(model, compared, group)
    group.compared.add(model)


def _check_weights(model: torch.nn.Module, compared: Mapping[str, torch.nn.Parameter], group: CPGroup) -> None:
    """Refuse the model on the ranks of the group."""
    if model not in group.compared:
        compare_all(compared_parameters(model), group.groups)
        return
    differ, broken = weights_differ(compared, group.groups)
    if broken:
        refuse_non_finite(compared_parameters(model), group.groups)
    if differ:
        for name, parameter in compared.items():
            refuse_difference(name, parameter, group.groups)
        raise different_weights(f"one of {', '.join(compared)} differs in its last row", group.groups)


def sampled(model: torch.nn.Module, group: CPGroup) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that the ranks compare for each batch; none where they are not to be compared."""
    if not group.config.check_batch or group.groups.size == 1:
        return {}
    return sampled_parameters(model)


def structure(model: torch.nn.Module, group: CPGroup) -> dict[str, str]:
    """Return names, dtypes and shapes of the parameters that are about to be compared whole, for each of them."""
    if model in group.compared:
        return {}
    return {name: f"{p.dtype} {tuple(p.shape)}" for name, p in compared_parameters(model).items()}


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


def shown(batch: Mapping[str, Any], group: CPGroup) -> dict[str, Any]:
    """Return what an error names of batches that differ: tensors, or dtypes and shapes where values may differ."""
    if SHARD in batch:  # the shards of ranks differ
        return {}
    tensors = {name: x for name, x in batch.items() if isinstance(x, torch.Tensor)}
    return {
        name: x if group.config.check_batch or name in PLANNED else f"{x.dtype} {tuple(x.shape)}"
        for name, x in tensors.items()
    }


def signature(model: torch.nn.Module) -> dict[str, object]:
    """Return the properties of a model that must be equal on all ranks, by words for them."""
    parameter = next(model.parameters(), None)
    return {
        CLASS: type(model).__name__,
        MODE: "training" if model.training else "evaluation",
        DTYPE: None if parameter is None else str(parameter.dtype),
    }
