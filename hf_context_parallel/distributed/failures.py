"""Why a rank failed, told to the ranks that wait for it."""

from __future__ import annotations

from typing import ClassVar
from weakref import WeakKeyDictionary

import torch.distributed as dist


class FailureReport:
    """Error message that a failing rank publishes so that its peers can raise it.

    All ranks open the same blocks, so a block's number says which message is of it. A message is left in the store
    through which the processes met, which outlives their connections.
    """

    _opened: ClassVar[WeakKeyDictionary[object, int]] = WeakKeyDictionary()
    """How many blocks were opened since the processes of a world met."""

    def __init__(self) -> None:
        world = dist.group.WORLD if dist.is_initialized() else type(self)
        self.block = self._opened[world] = self._opened.get(world, 0) + 1

    def publish(self, error: BaseException) -> None:
        """Tell the other ranks why this one raised in this block; or raise what another told, if that is why.

        Raises:
            RuntimeError: with the other's message, if `error` is that waiting for it has failed.
        """
        if dist.is_initialized() and not _is_of_waiting(error):
            store = dist.distributed_c10d._get_default_store()
            store.set(self._key(self.block), f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        self.explain(error, self.block)

    def explain(self, error: BaseException, block: int) -> None:
        """Raise what another rank left in a block, if `error` is that waiting for it has failed.

        Raises:
            RuntimeError: with the other's message.
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


def _is_of_waiting(error: BaseException) -> bool:
    """Whether an error is of a message or collective that failed: gloo's are RuntimeErrors that name its files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
