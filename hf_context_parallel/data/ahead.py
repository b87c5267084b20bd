"""Batches that are sharded and planned where they are loaded, one or more steps before their own.

A data loader collates in a worker process, or in the process of the rank just before the step that comes first. There
the shard of a batch is taken, and attention is planned for the layers that earlier batches have shown. In the step all
is there. What is not, as the plans of the first batches, the step makes.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.state import GradientState
from accelerate.utils import send_to_device
from torch.utils.data import get_worker_info

from ..config import ContextParallelConfig
from ..distributed.host import remember
from ..planning.layout import Layout
from ..planning.mask import Document
from .batch import SHARD
from .ready import describing, keep_ready
from .shard import shard_batch


class Planner(Protocol):
    """Planner of attention, which can be pickled; see `attention.planner.Planner`."""

    config: ContextParallelConfig
    rank: int

    @property
    def met(self) -> Any:
        """Layers and free memory by which another planner plans alike."""

    def meet(self, met: Any) -> None:
        """Take what another planner has met."""

    def plan(self, layout: Layout, rows: tuple[tuple[Document, ...], ...]) -> None:
        """Plan a batch."""

    def take_made(self) -> Any:
        """Return what was made since the last call."""

    def learn(self, made: Any) -> None:
        """Keep what another process has made."""


class Loaded(NamedTuple):
    """Batch as a collate function returns it to the loader, with what the process of the rank learns about it.

    Args:
        batch: the batch.
        counts: the number of samples of each group that are not repeated ones, if they are counted.
        ahead: the shard or None, and what a worker has planned or None. They are pickled, since each tensor that a
            worker sends takes a file descriptor.
    """

    batch: Any
    counts: list[int] | None = None
    ahead: bytes | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Any:
        """Move the batch to a device and return it alone. The rest goes to the active data loader.

        Accelerate calls this just before its loader yields the batch that came before.
        """
        loader = GradientState().active_dataloader
        if self.counts is not None:
            loader.counts = self.counts
            loader.remainder = 0  # gather_for_metrics already removes repeated samples, by the counts
        loader.collate_fn.take(self)
        return moved(self.batch, device, non_blocking)


def moved(batch: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """Move a batch to a device. The host remembers the values of its tensors."""
    found = send_to_device(batch, device, non_blocking=non_blocking)
    if isinstance(batch, Mapping):
        for name, source in batch.items():
            if isinstance(source, torch.Tensor):
                remember(found[name], source)
    return found


class PlanAhead:
    """Collate function that plans the batches of another one. It returns `Loaded`.

    Args:
        collate: the other collate function.
        planner: the planner of the rank; None to plan nothing.
    """

    def __init__(self, collate: Callable[[list], Any], planner: Planner | None):
        self._collate, self._planner = collate, planner
        self._board = None if planner is None else Board()
        self._copy: Planner | None = None
        """Planner of a worker."""

    def take(self, loaded: Loaded) -> None:
        """Keep what was made ahead, and show workers what the planner of the rank has met."""
        if self._planner is None or self._board is None:
            return
        if loaded.ahead is not None:
            local, made = pickle.loads(loaded.ahead)
            if local is not None:
                keep_ready(loaded.batch, self._planner.config, self._planner.rank, local)
            if made is not None:
                self._planner.learn(made)
        self._board.write(self._planner.met)

    def __call__(self, samples: list) -> Loaded:
        collated = self._collate(samples)
        loaded = collated if isinstance(collated, Loaded) else Loaded(collated)
        if self._planner is None or not isinstance(loaded.batch, Mapping):
            return loaded
        if get_worker_info() is None:
            return loaded._replace(ahead=pickle.dumps((_planned(self._planner, loaded.batch), None)))
        if self._copy is None:
            self._copy = pickle.loads(pickle.dumps(self._planner))
            self._copy.take_made()
        assert self._board is not None
        met = self._board.read()
        if met is not None:
            self._copy.meet(met)
        local = _planned(self._copy, loaded.batch)
        return loaded._replace(ahead=pickle.dumps((local, self._copy.take_made())))


def _planned(planner: Planner, batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """Plan a batch and return its shard. It is None for a batch that is a shard, or that cannot be sharded.

    What cannot be sharded is refused in its step, by all ranks together.
    """
    try:
        local = batch if SHARD in batch else shard_batch(describing(batch), planner.config, planner.rank)
        planner.plan(local[SHARD].layout, local[SHARD].rows)
    except ValueError:
        return None
    return None if local is batch else local


class Board:
    """Shared memory in which a process shows a value to its workers, whether they are forked or spawned.

    A value that has not been written whole is not read.
    """

    SIZE = 1 << 16

    def __init__(self) -> None:
        self._memory = torch.zeros(self.SIZE, dtype=torch.uint8).share_memory_()
        self._seen = b""

    def write(self, value: Any) -> None:
        """Show a value in place of the one before. One that is too large is not shown."""
        content = pickle.dumps(value)
        content = zlib.crc32(content).to_bytes(4, "big") + len(content).to_bytes(4, "big") + content
        if len(content) <= self.SIZE and content != self._seen:
            self._memory[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            self._seen = content

    def read(self) -> Any:
        """Return the value. It is None if there is none, or it has been read before."""
        head = bytes(self._memory[:8].tolist())
        content = self._memory[8 : 8 + int.from_bytes(head[4:], "big")].numpy().tobytes()
        if head + content == self._seen or not content or zlib.crc32(content) != int.from_bytes(head[:4], "big"):
            return None
        self._seen = head + content
        return pickle.loads(content)
