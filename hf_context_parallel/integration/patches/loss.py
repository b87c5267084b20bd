"""Losses that are no sum over the tokens of a shard, and their correction."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from ...compat import causal_lm_loss
from ...data.shard import Shard
from ...distributed.host import beside
from ..active_batch import active_batch
from ..model_registry import UNSHIFTED
from .module_patch import by_name

BALANCING = "load_balancing_loss_func"
"""Name of the function by which mixtures of experts in Transformers compute their auxiliary loss."""


def install_balancing_loss(model: PreTrainedModel) -> None:
    """Let the auxiliary loss of a mixture of experts be computed on the whole batch in the block of `cp.shard`.

    This loss is a product of means over tokens, so the values of the shards do not add up to it. Each of N ranks
    gathers the router logits, computes the loss of the whole batch, and returns 1/N of it. Models look the function up
    by name in their module, so it is replaced there, once.
    """
    names = inspect.unwrap(type(model).forward).__globals__
    original = names.get(BALANCING)
    if original is None or inspect.unwrap(original) is not original:
        return

    @wraps(original)
    def of_whole_batch(*args: Any, **kwargs: Any) -> Any:
        batch = active_batch()
        if batch is None or batch.run_outermost is None:
            return original(*args, **kwargs)
        given = by_name(original, args, kwargs)  # the function of Doge takes more arguments
        router = given["gate_logits"]
        if not isinstance(router, (tuple, list)):
            return original(**given)
        rows = batch.shard.batch_size
        gathered = [batch.gather(logits.reshape(rows, -1, logits.shape[-1])).flatten(0, 1) for logits in router]
        padding = batch.shard.padding
        mask = None if padding is None else beside(padding, gathered[0])
        return original(**given | {"gate_logits": tuple(gathered), "attention_mask": mask}) / batch.group.size

    names[BALANCING] = of_whole_batch


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
        count, labels = (beside(x, logits) for x in (shard.unshifted_count, shard.unshifted))
        loss = causal_lm_loss()(logits, None, logits.shape[-1], num_items_in_batch=count, shift_labels=labels)
    elif getattr(config, "z_loss_coefficient", 0):
        if shard.padding is not None:
            raise ValueError(
                f"z_loss_coefficient={config.z_loss_coefficient} weights a mean over all logits, and the logits of "
                "padding differ from those of one process. Set it to 0, or pack the batch instead of padding it."
            )
        # The model has added the mean over its shard. It is replaced by this shard's share of the mean over the batch.
        squares = logits.logsumexp(dim=-1).to(output["loss"].dtype).pow(2)
        real = (shard.layout.positions(shard.rank) < shard.length).nonzero().flatten()
        mean = squares.index_select(1, beside(real, logits)).sum() / (shard.batch_size * shard.length)
        loss = output["loss"] + config.z_loss_coefficient * (mean - squares.mean())
    else:
        return None
    return type(output)(**{**output, "loss": loss})
