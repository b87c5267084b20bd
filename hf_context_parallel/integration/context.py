"""Which batch is being computed: the one thing that the attention function looks up.

Transformers' attention function gets the tensors of a layer and no batch, so the batch is found here. It is entered
and left in one place, by `ContextParallel.shard`; batches nest, as when evaluation runs inside training.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..consensus import agree, fingerprint
from ..data import SHARD, Shard, shard_batch
from .models import NAME, check_model

if TYPE_CHECKING:
    from ..context_parallel import ContextParallel

# Not a context variable: on CUDA, backward (and with it the recomputation of gradient checkpointing) runs in a thread
# of autograd's own, which sees no other thread's.
_open: list[ShardedBatch] = []


def current_batch() -> ShardedBatch | None:
    """The innermost batch that has been entered and not left."""
    return _open[-1] if _open else None


class ShardedBatch(AbstractContextManager):
    """`with` block in which the model computes with one rank's share of a batch; see `ContextParallel.shard`."""

    def __init__(self, cp: ContextParallel, batch: Mapping[str, Any], model: torch.nn.Module | None):
        self.cp = cp
        self.shard: Shard
        self.attended = False
        self._batch = batch
        self._model = model
        self._entered = self._left = False
        self._positions: torch.Tensor
        self._running: torch.nn.Module | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> dict[str, Any]:
        if self._entered:
            raise RuntimeError("this sharded batch was entered before: call cp.shard(batch) again for another pass.")
        self._entered = True
        local, error = {}, None
        try:
            if self._model is not None:
                check_model(self._model)
            local = self._local()
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = caught
        about = {"batch": local[SHARD].fingerprint if local else 0, "model": _signature(self._model)}
        agree(
            self.cp.groups,
            error,
            fingerprint(about),
            "batches or models",
            "All ranks of a CP group must be given the same: use cp.prepare_data_loader() or ContextParallelTrainer, "
            "which deal samples to CP groups rather than ranks.",
        )
        self.shard, self._positions = local.pop(SHARD), local["position_ids"]
        del self._batch, self._model
        _open.append(self)
        self._hooks = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        return local

    def __exit__(self, kind, error, traceback) -> None:
        for hook in self._hooks:
            hook.remove()
        self._left = True
        if _open[-1] is not self:
            _open.remove(self)
            raise RuntimeError("sharded batches must be left in the reverse of the order in which they were entered.")
        _open.pop()

    def check_backward(self) -> None:
        """Raise unless this batch's gradients can be computed now."""
        if self._left:
            raise RuntimeError(
                "backward of a sharded batch after leaving it: call backward() inside `with cp.shard(...)`."
            )
        if current_batch() is not self:
            raise RuntimeError(
                "backward of a sharded batch inside another one's `with cp.shard(...)`: leave the inner one first."
            )

    def _local(self) -> dict[str, Any]:
        """The batch as this rank's share of it, whether it came whole or from the collator."""
        if SHARD not in self._batch:
            return shard_batch(self._batch, self.cp.config, self.cp.rank)
        local = dict(self._batch)
        plan = local[SHARD].plan
        if (plan.rank, plan.size) != (self.cp.rank, self.cp.size):
            raise ValueError(
                f"the batch was sharded for rank {plan.rank} of {plan.size} and this is rank {self.cp.rank} of "
                f"{self.cp.size}: give the collator cp.config and cp.rank."
            )
        return local

    @torch.compiler.disable
    def _before(self, module: torch.nn.Module, _) -> None:
        """Check the model that is about to run: the outermost, whether or not it was passed to `shard`."""
        if isinstance(module, PreTrainedModel) and current_batch() is self and self._running is None:
            check_model(module)
            self._running, self.attended = module, False

    @torch.compiler.disable
    def _after(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = None) -> None:
        """Check what the model was given and that it used our attention; there is no output if it raised."""
        if module is not self._running:
            return
        self._running = None
        if output is None:
            return
        if not self.attended:
            raise RuntimeError(
                f"a model ran on a shard, but none of its attention layers used {NAME!r}: each rank attended to its "
                f"own shard alone, and the result is wrong. Load the model with attn_implementation={NAME!r}."
            )
        self._check_inputs(_arguments(module, args, kwargs))
        # Reentrant checkpointing builds its graph in backward, when it is too late to tell which batch it is of.
        for tensor in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(self._check_hook)

    def _check_hook(self, _) -> None:
        self.check_backward()

    def _check_inputs(self, given: Mapping[str, Any]) -> None:
        """Refuse a call without the inputs that make a shard's result that of the whole."""
        positions = given.get("position_ids")
        complete = given.get("use_cache") is False and isinstance(positions, torch.Tensor)
        if given.get("labels") is not None:
            complete &= given.get("shift_labels") is not None and given.get("num_items_in_batch") is not None
        # The same tensor in nearly every call; a copy, perhaps on another device, is compared by its values.
        if not complete or not (positions is self._positions or torch.equal(positions.cpu(), self._positions.cpu())):
            raise ValueError(
                "the model must be called with all that cp.shard yields: position_ids, use_cache=False, and with "
                "labels also shift_labels and num_items_in_batch. Call it as model(**local); call other models, and "
                "generate(), outside the block."
            )


def _arguments(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module's forward was given, by name."""
    signature = inspect.signature(module.forward)
    arguments = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def _signature(model: torch.nn.Module | None) -> tuple:
    """What all ranks' models must have in common."""
    return () if model is None else (type(model).__name__, str(next(model.parameters()).dtype))
