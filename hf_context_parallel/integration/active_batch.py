"""The batch that is being computed: all that patches and the attention function need of it.

Transformers gives the attention function and the mask function the tensors of a layer and no batch, so the batch is
found here. It is entered and left in one place, by `ShardedBatch`; batches nest, as when evaluation runs inside
training.
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
    """A shard, and the group that computes with it.

    Args:
        shard: this rank's share of the batch.
        group: the ranks that have the other shares.
    """

    def __init__(self, shard: Shard, group: CPGroup):
        self.shard, self.group = shard, group
        self.handled: dict[str, set[str]] = {}
        """For each class of modules that mix tokens: how they were computed."""
        self.strategies: dict[tuple, Strategy] = {}
        """Those of the layers so far, by pattern, communication type and ranks of a subgroup."""
        self._choices: dict[tuple, Choice] = {}
        self._closed = False

    def note(self, module: torch.nn.Module, how: str) -> None:
        """Remember how a module that mixes tokens is computed."""
        self.handled.setdefault(type(module).__name__, set()).add(how)

    def strategy(self, module: torch.nn.Module, pattern: Pattern, shape: Shape, device: torch.device) -> Strategy:
        """What this rank computes and moves in a layer; made for the first of its kind.

        Raises:
            ValueError: if the configuration says nothing of such a layer.
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
        """`[B, S_local]`, where each token stands in its row; in its document, where rows are packed."""
        shard = self.shard
        rows = shard.rows if shard.packed else ((),) * shard.batch_size
        return positions_in_documents(rows, shard.layout.length)[:, shard.layout.positions(shard.rank)]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S_local, ...]` as `[B, S, ...]` in the original order, on every rank. Differentiable.

        Raises:
            ValueError: if the tensor's first two dimensions are not the shard's; on this rank alone, so that the
                others wait for it.
        """
        shard, expected = self.shard, self.shard.local_shape
        if tuple(x.shape[:2]) != expected:
            raise ValueError(
                f"cp.gather() takes a tensor that begins with {expected}, this shard's; got {tuple(x.shape)}."
            )
        return gather_sequence(x, shard.layout, shard.length, self.group.groups.group)

    def close(self) -> None:
        """Compute no more gradients."""
        self._closed = True

    def check_backward(self) -> None:
        """Raise unless this batch's gradients can be computed now."""
        if self._closed:
            raise RuntimeError(
                "backward of a sharded batch after leaving it: call backward() inside `with cp.shard(...)`."
            )
        if active_batch() is not self:
            raise RuntimeError(
                "backward of a sharded batch inside another one's `with cp.shard(...)`: leave the inner one first."
            )


# Not a context variable: on CUDA, backward (and with it the recomputation of gradient checkpointing) runs in a thread
# of autograd's own, which sees no other thread's.
_open: list[ActiveBatch | None] = []


def active_batch() -> ActiveBatch | None:
    """The innermost batch that has been entered and not left."""
    return _open[-1] if _open else None


def enter(batch: ActiveBatch) -> None:
    _open.append(batch)


def leave(batch: ActiveBatch) -> None:
    """Close the innermost batch.

    Raises:
        RuntimeError: if it is not this one.
    """
    batch.close()
    if _open[-1] is not batch:
        _open.remove(batch)
        raise RuntimeError("sharded batches must be left in the reverse of the order in which they were entered.")
    _open.pop()


@contextmanager
def no_batch() -> Iterator[None]:
    """What runs meanwhile is not sharded: attention is what it would be without us."""
    _open.append(None)
    try:
        yield
    finally:
        _open.pop()
