"""The active batch: the shard, the group and the strategies that patches and the attention function look up.

Transformers passes the tensors of a layer to the attention function and the mask function, and no batch. They find the
batch here. The border of a decoder enters and leaves it, and so does the block of `cp.shard`. Gradient checkpointing
recomputes a layer in backward, perhaps in another thread: the function that is checkpointed carries the batch, and
enters it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch

from ..attention.strategy import Shape, Strategy
from ..attention.tape import with_tape
from ..cp_group import CPGroup
from ..data.batch import positions_in_documents, take_columns
from ..data.shard import Shard
from ..distributed.gather import gather_sequence, sum_over_ranks
from ..planning.mask import Pattern, layer_type

Part = TypeVar("Part")


class ActiveBatch:
    """A shard, and the CP group that computes the whole batch.

    Args:
        shard: the tokens of the batch that this rank holds.
        group: the ranks that hold all shards.
        padding_reads: True to compute attention for the queries of padding too. Their outputs are those of
            Transformers then, and 0 otherwise. No token reads padding.
        run_outermost: in the block of `cp.shard`, a function that runs the outermost model on the shard. It is called
            as `run_outermost(module, forward, args, kwargs)`.
    """

    def __init__(
        self, shard: Shard, group: CPGroup, padding_reads: bool = False, run_outermost: Callable | None = None
    ):
        self.shard, self.group, self.run_outermost = shard, group, run_outermost
        self._padding_reads = padding_reads and shard.padding is not None
        self.attention_checkpoints = "off"
        """Place where gradient checkpointing keeps attention: `"off"`, `"device"` or `"host"`."""
        self.handled: dict[str, set[str]] = {}
        """Class names of modules that mix tokens, each with the ways in which they were computed."""
        self.strategies: dict[tuple, Strategy] = {}
        """Strategies of the layers so far, by pattern, communication type, shape and device."""
        self.patterns: dict[Pattern, Pattern | None] = {}
        """Patterns of the masks of this batch, each under its rule without blocks. None for several."""
        self._parts: dict[type, Any] = {}

    def part(self, kind: type[Part]) -> Part:
        """Return the part of this batch of a class, `kind(self)`, which is made in the first call."""
        if kind not in self._parts:
            self._parts[kind] = kind(self)  # type: ignore[call-arg]
        return self._parts[kind]

    def note(self, module: str, how: str) -> None:
        """Remember how a class of modules that mix tokens is computed."""
        self.handled.setdefault(module, set()).add(how)

    def strategy(self, layer: int | None, pattern: Pattern, shape: Shape, device: torch.device) -> Strategy:
        """Return the strategy of a layer. Layers with the same pattern, shapes and communication type share one.

        Args:
            layer: number of the layer in the model, or None if it has none.

        Raises:
            ValueError: if the configuration names no communication type for such a layer.
        """
        shard = self.shard
        comm_type = self.group.config.comm_type_of(layer_type(pattern), layer)
        key = pattern, comm_type, shape, device
        if key not in self.strategies:
            how = comm_type, shard.layout, shard.mask(pattern), shape, device, self._padding_reads
            self.strategies[key] = self.group.strategy(*how)
        return self.strategies[key]

    @cached_property
    def indices(self) -> torch.Tensor:
        """Index of each token in its row, `[B, S_local]`. Where rows are packed it is the index in the document."""
        shard = self.shard
        rows = shard.rows if shard.packed else ((),) * shard.batch_size
        return positions_in_documents(rows, shard.layout.length)[:, shard.layout.positions(shard.rank)]

    @property
    def whole_shape(self) -> tuple[int, int]:
        """Rows and tokens of the whole batch."""
        return self.shard.batch_size, self.shard.length

    @property
    def local_shape(self) -> tuple[int, int]:
        """Rows and tokens of this rank."""
        return self.shard.local_shape

    def take(self, x: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Take the tokens of this rank, `[B, S_local, ...]`, of `[B, S, ...]`. Padding of the layout is `fill`.

        Raises:
            ValueError: if the first two dimensions of the tensor are not those of the whole batch.
        """
        shard = self.shard
        if tuple(x.shape[:2]) != self.whole_shape:
            raise ValueError(
                f"a tensor has shape {tuple(x.shape)}, and the batch has {shard.batch_size} rows of {shard.length} "
                "tokens. Give a tensor whose shape begins with these."
            )
        return take_columns(x, shard.layout.positions(shard.rank), shard.layout.length, fill)

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

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks. Differentiable; see `sum_over_ranks`."""
        return sum_over_ranks(x, self.group.size, self.group.groups.group)


class _Entered(threading.local):
    """Stack of the batches that a thread has entered and not left. A None stands for no batch."""

    def __init__(self) -> None:
        self.batches: list[ActiveBatch | None] = []


_entered = _Entered()


def active_batch() -> ActiveBatch | None:
    """Return the innermost batch that this thread has entered and not left, or None."""
    return _entered.batches[-1] if _entered.batches else None


def enter(batch: ActiveBatch | None) -> None:
    """Make a batch the innermost one of this thread."""
    _entered.batches.append(batch)


def leave(batch: ActiveBatch | None) -> None:
    """Leave a batch, which must be the innermost one of this thread.

    Raises:
        RuntimeError: if another batch was entered later and has not been left.
    """
    if _entered.batches[-1] is not batch:
        _entered.batches.remove(batch)
        raise RuntimeError(
            "a sharded batch was left before one that was entered later. Leave the batch that was entered last first."
        )
    _entered.batches.pop()


@contextmanager
def entered(batch: ActiveBatch | None) -> Iterator[None]:
    """Compute the shard of a batch in this block. With None, attention is that of Transformers."""
    enter(batch)
    try:
        yield
    finally:
        leave(batch)


def carrying(checkpoint: Callable) -> Callable:
    """Wrap a function for gradient checkpointing, `checkpoint(run, ...)`, so that `run` carries the active batch.

    The batch is active whenever `run` is called: in the first pass, and in recomputation after the batch was left.
    Attention of the first pass is kept for the others, where the batch says so.
    """

    @wraps(checkpoint)
    def carry(run: Callable, *args: Any, **kwargs: Any):
        batch = active_batch()
        if batch is None:
            return checkpoint(run, *args, **kwargs)

        def run_in_batch(*args: Any, **kwargs: Any):
            if torch.compiler.is_compiling():  # compiled layers find their batch by their mask
                return run(*args, **kwargs)
            with entered(batch):
                return run(*args, **kwargs)

        # Compiled layers, and those with a policy for single operators, decide by themselves what is computed again.
        decides = torch.compiler.is_compiling() or "context_fn" in {**getattr(checkpoint, "keywords", {}), **kwargs}
        if decides or batch.attention_checkpoints == "off" or not torch.is_grad_enabled():
            return checkpoint(run_in_batch, *args, **kwargs)
        on_host = batch.attention_checkpoints == "host"
        return checkpoint(with_tape(run_in_batch, on_host), *args, **kwargs)

    vars(carry)["carries_batch"] = True
    return carry
