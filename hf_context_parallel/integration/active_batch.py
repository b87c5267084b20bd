"""The active batch: the shard, the group and the strategies that patches and the attention function look up.

Transformers passes the tensors of a layer to the attention function and the mask function, and no batch. They find the
batch here. `ShardedBatch` alone enters and leaves it. Batches nest: evaluation may run inside a training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch

from ..attention.auto_strategy import Choice
from ..attention.strategy import Shape, Strategy, build_strategy
from ..cp_group import CPGroup
from ..data.batch import positions_in_documents
from ..data.shard import Shard
from ..distributed.gather import gather_sequence
from ..planning.mask import Pattern, layer_type


class ActiveBatch:
    """A shard, and the CP group that computes the whole batch.

    Args:
        shard: the tokens of the batch that this rank holds.
        group: the ranks that hold all shards.
    """

    def __init__(self, shard: Shard, group: CPGroup):
        self.shard, self.group = shard, group
        self.handled: dict[str, set[str]] = {}
        """Class names of modules that mix tokens, each with the ways in which they were computed."""
        self.strategies: dict[tuple, Strategy] = {}
        """Strategies of the layers so far, by pattern, communication type and size of a subgroup."""
        self._choices: dict[tuple, Choice] = {}
        self._closed = False

    def note(self, module: torch.nn.Module, how: str) -> None:
        """Remember how a module that mixes tokens is computed."""
        self.handled.setdefault(type(module).__name__, set()).add(how)

    def strategy(self, module: torch.nn.Module, pattern: Pattern, shape: Shape, device: torch.device) -> Strategy:
        """Return the strategy of a layer. Layers with the same pattern, shapes and communication type share one.

        Raises:
            ValueError: if the configuration names no communication type for such a layer.
        """
        shard = self.shard
        comm_type = self.group.config.comm_type_of(layer_type(pattern), getattr(module, "layer_idx", None))
        key = pattern, comm_type, shape, device
        if key not in self._choices:
            self._choices[key] = self.group.choice(comm_type, shard.layout, shard.mask(pattern), shape, device)
        made = pattern, *self._choices[key][:2]
        if made not in self.strategies:
            self.strategies[made] = build_strategy(*made[1:], shard.layout, shard.mask(pattern), shard.rank)
        return self.strategies[made]

    @cached_property
    def indices(self) -> torch.Tensor:
        """Index of each token in its row, `[B, S_local]`. Where rows are packed it is the index in the document."""
        shard = self.shard
        rows = shard.rows if shard.packed else ((),) * shard.batch_size
        return positions_in_documents(rows, shard.layout.length)[:, shard.layout.positions(shard.rank)]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gather `[B, S_local, ...]` to `[B, S, ...]` in the original order, on every rank. Differentiable.

        Raises:
            ValueError: if the first two dimensions of the tensor are not those of the shard. Only this rank raises,
                and the others wait for it.
        """
        shard, expected = self.shard, self.shard.local_shape
        if tuple(x.shape[:2]) != expected:
            raise ValueError(
                f"cp.gather() got a tensor of shape {tuple(x.shape)}, and this shard has rows and tokens {expected}. "
                f"Pass a tensor whose shape begins with {expected}."
            )
        return gather_sequence(x, shard.layout, shard.length, self.group.groups.group)

    def close(self) -> None:
        """Refuse backward from now on."""
        self._closed = True

    def check_backward(self) -> None:
        """Raise unless the gradients of this batch can be computed now."""
        if self._closed:
            raise RuntimeError(
                "backward of a sharded batch ran after its block was left. Call backward() inside "
                "`with cp.shard(...)`."
            )
        if active_batch() is not self:
            raise RuntimeError(
                "backward of a sharded batch ran inside the block of another batch. Before backward() of the outer "
                "batch, leave the inner one first."
            )


# This is not a context variable. On CUDA, backward runs in a thread of autograd, which does not see the context
# variables of another thread. The recomputation of gradient checkpointing runs there too.
_open: list[ActiveBatch | None] = []


def active_batch() -> ActiveBatch | None:
    """Return the innermost batch that has been entered and not left, or None."""
    return _open[-1] if _open else None


def enter(batch: ActiveBatch) -> None:
    """Make a batch the innermost one."""
    _open.append(batch)


def leave(batch: ActiveBatch) -> None:
    """Close a batch, which must be the innermost one.

    Raises:
        RuntimeError: if another batch was entered later and has not been left.
    """
    batch.close()
    if _open[-1] is not batch:
        _open.remove(batch)
        raise RuntimeError(
            "a sharded batch was left before one that was entered later. Leave the batch that was entered last first."
        )
    _open.pop()


@contextmanager
def no_batch() -> Iterator[None]:
    """Compute without an active batch: attention is that of Transformers."""
    _open.append(None)
    try:
        yield
    finally:
        _open.pop()
