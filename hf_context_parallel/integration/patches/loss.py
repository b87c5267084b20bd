"""Losses that are no sum over the tokens of a shard, and their correction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ...compat import causal_lm_loss
from ...data.shard import Shard
from ..active_batch import ActiveBatch
from ..model_registry import UNSHIFTED
from .module_patch import by_name

BALANCING = "load_balancing_loss_func"
"""Name of the function by which mixtures of experts in Transformers compute their auxiliary loss."""


class BalancingLoss:
    """Block in which the auxiliary loss of a mixture of experts is computed on the whole batch.

    This loss is a product of means over tokens, so the values of the shards do not add up to it. Each of N ranks
    gathers the router logits, computes the loss of the whole batch, and returns 1/N of it. Models look the function up
    by name in their module, so it is replaced there.
    """

    def __init__(self, batch: ActiveBatch, model: PreTrainedModel):
        self._batch = batch
        self._names = inspect.unwrap(type(model).forward).__globals__
        self._original: Callable | None = None

    def __enter__(self) -> None:
        if BALANCING in self._names:
            self._original = self._names[BALANCING]
            self._names[BALANCING] = self._of_whole_batch

    def __exit__(self, *_: Any) -> None:
        if self._original is not None:
            self._names[BALANCING] = self._original

    def _of_whole_batch(self, *args: Any, **kwargs: Any):
        given = by_name(self._original, args, kwargs)  # the function of Doge takes more arguments
        router = given["gate_logits"]
        if not isinstance(router, (tuple, list)):
            return self._original(**given)
        given["gate_logits"] = tuple(self._gathered(logits) for logits in router)
        padding = self._batch.shard.padding
        given["attention_mask"] = None if padding is None else padding.to(given["gate_logits"][0].device)
        return self._original(**given) / self._batch.group.size

    def _gathered(self, logits: torch.Tensor) -> torch.Tensor:
        shard = self._batch.shard
        by_row = logits.reshape(shard.batch_size, -1, logits.shape[-1])
        return self._batch.gather(by_row).flatten(0, 1)


def corrected_loss(model: PreTrainedModel, output: Any, given: Mapping[str, Any], shard: Shard) -> Any:
    """Replace the loss of an output, so that the losses of the ranks add up to the loss of one process.

    Args:
        given: arguments of the forward of the model, by name.

    Returns:
        The output with the corrected loss, or None where the loss is right already.

    Raises:
        ValueError: if the loss cannot be corrected with these arguments.
    """
    config = model.config
    if given.get("labels") is None:
        return None
    if not isinstance(output, Mapping):
        if config.model_type in UNSHIFTED or getattr(config, "z_loss_coefficient", 0):
            raise ValueError(
                f"return_dict=False: the loss of a {config.model_type} is a mean over its shard, and can be corrected "
                "only in an output with the key 'loss'. Leave return_dict out, or set it to True."
            )
        return None
    logits = output["logits"]
    if config.model_type in UNSHIFTED:
        count = shard.unshifted_count
        labels = shard.unshifted.to(logits.device)
        loss = causal_lm_loss()(
            logits, None, logits.shape[-1], num_items_in_batch=count.to(logits.device), shift_labels=labels
        )
    elif getattr(config, "z_loss_coefficient", 0):
        if shard.padding is not None:
            raise ValueError(
                f"z_loss_coefficient={config.z_loss_coefficient} weights a mean over all logits, and the logits of "
                "padding differ from those of one process. Set it to 0, or pack the batch instead of padding it."
            )
        # The model has added the mean over its shard. It is replaced by this shard's share of the mean over the batch.
        squares = logits.logsumexp(dim=-1).to(output["loss"].dtype).pow(2)
        real = shard.layout.positions(shard.rank).to(logits.device) < shard.length
        mean = squares[:, real].sum() / (shard.batch_size * shard.length)
        loss = output["loss"] + config.z_loss_coefficient * (mean - squares.mean())
    else:
        return None
    return type(output)(**{**output, "loss": loss})
