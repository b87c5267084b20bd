"""Switches for comparisons: they admit unchecked model types, or change how models run outside of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Switches:
    """State of all switches. They are off outside of the blocks below.

    Args:
        unchecked_models: run model types that have not been found exact.
        stock_attn_name: report the name of a Transformers attention to layers that ask which attention they have.
        shards_on_one_rank: shard batches in CP groups of one rank too, where Transformers would compute them.
        other_attention: outside of a batch, compute attention with the other implementation of Transformers.
        several_tiles: run modules that treat each token alone on several tiles, however short the batch is.
        listeners: functions called with each layer whose attention is computed outside of a batch.
    """

    unchecked_models: bool = False
    stock_attn_name: bool = False
    shards_on_one_rank: bool = False
    other_attention: bool = False
    several_tiles: bool = False
    listeners: list[Callable[[torch.nn.Module], None]] = field(default_factory=list)


switches = Switches()


@contextmanager
def _on(name: str) -> Iterator[None]:
    before = getattr(switches, name)
    setattr(switches, name, True)
    try:
        yield
    finally:
        setattr(switches, name, before)


def allow_unchecked_models() -> AbstractContextManager[None]:
    """Run model types that have not been found exact, so that they can be compared."""
    return _on("unchecked_models")


def report_stock_attn_name() -> AbstractContextManager[None]:
    """Report the name of a Transformers attention to layers that ask, so that their models run outside of a batch."""
    return _on("stock_attn_name")


def sharded_on_one_rank() -> AbstractContextManager[None]:
    """Shard batches in CP groups of one rank too, so that they can be compared."""
    return _on("shards_on_one_rank")


def computed_otherwise() -> AbstractContextManager[None]:
    """Compute attention outside of a batch with the other implementation of Transformers.

    In place of SDPA it is the eager function of the class. In place of the eager function it is the same function in a
    wider dtype.
    """
    return _on("other_attention")


def several_tiles() -> AbstractContextManager[None]:
    """Run modules that treat each token alone on several tiles if `tile_tokens` is set, however short the batch is."""
    return _on("several_tiles")


@contextmanager
def heard_by(listener: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """Call `listener(module)` for each layer whose attention is computed outside of a batch in this block."""
    switches.listeners.append(listener)
    try:
        yield
    finally:
        switches.listeners.remove(listener)
