"""Which batch is being computed: the one thing that the attention function looks up.

Transformers' attention function gets the tensors of a layer and no batch, so the batch is found here. It is entered
and left in one place, by `ContextParallel.shard`; batches nest, as when evaluation runs inside training.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from ..consensus import agree
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
        self._entered = self._left = self._called = False
        self._hook: Any = None

    def __enter__(self) -> dict[str, Any]:
        if self._entered:
            raise RuntimeError("this sharded batch was entered before: call cp.shard(batch) again for another pass.")
        self._entered = True
        local, error = {}, None
        try:
            if self._model is not None:
                check_model(self._model)
            local = self._local()
        except (ValueError, TypeError) as caught:
            error = caught
        mark = local[SHARD].fingerprint if local else 0
        agree(
            self.cp.groups,
            error,
            mark,
            "batches",
            "All ranks of a CP group must be given the same: use cp.prepare_data_loader() or ContextParallelTrainer, "
            "which deal samples to CP groups rather than ranks.",
        )
        self.shard = local.pop(SHARD)
        del self._batch, self._model
        _open.append(self)
        self._hook = register_module_forward_pre_hook(self._notice)
        return local

    def __exit__(self, kind, error, traceback) -> None:
        self._hook.remove()
        self._left = True
        if _open[-1] is not self:
            _open.remove(self)
            raise RuntimeError("sharded batches must be left in the reverse of the order in which they were entered.")
        _open.pop()
        if error is None and self._called and not self.attended:
            raise RuntimeError(
                f"a model ran on a shard, but none of its attention layers used {NAME!r}: each rank attended to "
                f"its own shard alone, and the result is wrong. Load the model with attn_implementation={NAME!r}."
            )

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

    def _notice(self, module: torch.nn.Module, _) -> None:
        if isinstance(module, PreTrainedModel) and current_batch() is self and not self._called:
            check_model(module)  # the outermost, whether or not it was passed to `shard`
            self._called = True
