"""Installation of all patches of a model. It happens once: a patch does what Transformers does without a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cp_group import CPGroup
from .active_batch import ActiveBatch, active_batch, carrying
from .mixers.native import NativePatch
from .mixers.recognise import is_native, mixers
from .mixers.whole_sequences import WholePatch
from .model_registry import decoder_of
from .patches.loss import install_balancing_loss
from .patches.module_patch import BatchPatch, ModulePatch, patch_of
from .patches.rope import RopePatch, follows_length
from .tensor_parallel.plan_styles import styles_of
from .tensor_parallel.replicated import ReplicatedParameters
from .tensor_parallel.sequence_parallel import SequenceParallelPatch
from .tiles import TilePatch

CHECKPOINTING = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes in which modules of Transformers and wrappers of PyTorch keep the function that checkpoints them."""


def install(model: PreTrainedModel, group: CPGroup) -> None:
    """Install the patches of all modules that need more than the attention function. A second call adds none.

    Args:
        model: the outermost Transformers model.
        group: the ranks that are going to hold the shards.

    Raises:
        ValueError: if the model does not have the form that sequence parallelism or `tile_tokens` requires.
    """
    if patch_of(model, OutermostPatch) is None:
        _install_always(model, group)
    if group.config.tile_tokens is not None:  # outside of the patches of sequence parallelism
        TilePatch().replace_parts(decoder_of(model))


def _install_always(model: PreTrainedModel, group: CPGroup) -> None:
    """Install the patches that do not depend on `tile_tokens`."""
    native, whole, rope, pooler = NativePatch(), WholePatch(), RopePatch(), PoolerPatch()
    for part in mixers(model):
        (native if is_native(part) else whole).replace(part)
    for part in model.modules():
        if follows_length(part):
            rope.replace(part)
        if isinstance(part, PreTrainedModel) and isinstance(getattr(part, "pooler", None), torch.nn.Module):
            pooler.replace(part.pooler)
    if group.groups.tensor.size > 1:
        ReplicatedParameters(group.groups.tensor.group).replace_all(styles_of(model))
    if group.config.sequence_parallel:
        SequenceParallelPatch().replace_parts(model)
    install_balancing_loss(model)
    outermost = OutermostPatch()
    outermost.replace(model)
    if (decoder := decoder_of(model)) is not model:
        outermost.replace(decoder)


def carry_batches(model: torch.nn.Module) -> bool:
    """Let the functions by which modules are checkpointed carry the active batch.

    Checkpointing may be switched on at any time, so this is called before each pass over a shard.

    Returns:
        True if this pass is going to be checkpointed.
    """
    found = False
    for module in model.modules():
        for name in CHECKPOINTING:
            function = vars(module).get(name)
            if function is None:
                continue
            found = found or (module.training and vars(module).get("gradient_checkpointing", True))
            if not hasattr(function, "carries_batch"):
                setattr(module, name, carrying(function))
    return found and torch.is_grad_enabled()


class OutermostPatch(ModulePatch):
    """Hands the outermost model over to the block of `cp.shard`, in which it runs on a shard."""

    def run(self, module: torch.nn.Module, forward: Callable, turn: Any, *args: Any, **kwargs: Any) -> Any:
        batch = active_batch()
        if batch is None or batch.run_outermost is None:
            return forward(*args, **kwargs)
        return batch.run_outermost(module, forward, args, kwargs)


class Pooling:
    """Part of an active batch: it gathers the input of a pooler."""

    def __init__(self, batch: ActiveBatch):
        self._batch = batch

    def run(self, module: torch.nn.Module, forward: Callable, turn: Any, hidden_states: torch.Tensor) -> Any:
        """Pool `[B, S, D]`."""
        return forward(self._batch.gather(hidden_states))


class PoolerPatch(BatchPatch):
    """Gives the pooler of a base model whole sequences: it takes the first token, or the mean of all."""

    part = Pooling
