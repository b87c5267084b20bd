"""Failure reports: a failing rank tells the ranks that wait for it why it failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch.distributed as dist


class FailureReport:
    """Error message that a failing rank publishes so that its peers can raise it.

    All ranks open the same blocks (of `cp.shard`, calls of a decoder, steps of the Trainer), so the number of a block
    identifies its message. The message is written to the store of the default process group, which outlives the
    connections between processes.
    """

    _opened: ClassVar[WeakKeyDictionary[object, int]] = WeakKeyDictionary()
    """Number of blocks that were opened in each default process group."""

    def __init__(self) -> None:
        world = dist.group.WORLD if dist.is_initialized() else type(self)
        self.block = self._opened[world] = self._opened.get(world, 0) + 1

    def publish(self, error: BaseException) -> None:
        """Tell the other ranks why this one raised in this block.

        Raises:
            RuntimeError: with the message of another rank, if `error` only says that waiting for a rank failed.
        """
        if dist.is_initialized() and not _is_of_waiting(error) and not _is_of_waiting(error.__cause__):
            store = dist.distributed_c10d._get_default_store()
            store.set(self._key(self.block), f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        self.explain(error, self.block)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Publish a refusal in this block, and explain an error of waiting by the block before.

        Ranks of other groups go on after a refusal, and then wait for this rank.
        """
        try:
            yield
        except RuntimeError as failure:
            self.explain(failure, self.block - 1)
            raise
        except ValueError as refusal:
            self.publish(refusal)
            raise

    def explain(self, error: BaseException, block: int) -> None:
        """Raise the message that another rank published in a block, if `error` only says that waiting failed.

        Raises:
            RuntimeError: with the message of the other rank.
        """
        if not dist.is_initialized() or not _is_of_waiting(error):
            return
        store = dist.distributed_c10d._get_default_store()
        key = self._key(block)
        if store.check([key]):
            raise RuntimeError(f"another rank failed before this one. {store.get(key).decode()}") from error

    @staticmethod
    def _key(block: int) -> str:
        return f"context_parallel/failed_in_block_{block}"


@contextmanager
def reported_failures() -> Iterator[None]:
    """Publish an exception of this block. All ranks enter the same blocks."""
    report = FailureReport()
    try:
        yield
    except BaseException as error:
        report.publish(error)
        raise


def _is_of_waiting(error: BaseException | None) -> bool:
    """Return True for the error of a failed message or collective. Gloo raises RuntimeErrors that name its files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
