"""Which batch is being computed: the one thing that the attention function and the mask function look up.

Transformers gives them the tensors of a layer and no batch, so the batch is found here. It is entered and left in one
place, by `ShardedBatch`; batches nest, as when evaluation runs inside training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .context import ShardedBatch

# Not a context variable: on CUDA, backward (and with it the recomputation of gradient checkpointing) runs in a thread
# of autograd's own, which sees no other thread's.
_open: list[ShardedBatch | None] = []


def current_batch() -> ShardedBatch | None:
    """The innermost batch that has been entered and not left."""
    return _open[-1] if _open else None


def enter(batch: ShardedBatch) -> None:
    _open.append(batch)


def leave(batch: ShardedBatch) -> None:
    """Close the innermost batch.

    Raises:
        RuntimeError: if it is not this one.
    """
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
