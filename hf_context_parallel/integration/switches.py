"""Switches that change what runs outside of a batch, or whether it may run in one: for comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Switches:
    """All that is on. Outside of the blocks below nothing is.

    Args:
        unchecked_models: model types run that are not known to be exact.
        stock_attn_name: layers that ask for the name of their attention are told that of Transformers' own.
        other_attention: outside of a batch, attention is computed in the other way that Transformers has.
        listeners: called with each layer whose attention is computed outside of a batch.
    """

    unchecked_models: bool = False
    stock_attn_name: bool = False
    other_attention: bool = False
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
    """Run types that are not known to be exact: to find out."""
    return _on("unchecked_models")


def report_stock_attn_name() -> AbstractContextManager[None]:
    """Models that ask for the name of their attention run outside of a batch: the layers that ask are told stock's."""
    return _on("stock_attn_name")


def computed_otherwise() -> AbstractContextManager[None]:
    """Outside of a batch, attention is meanwhile computed in the other way that Transformers has: where that would be
    SDPA, the class's eager function; where that is all there is, the same in a wider dtype."""
    return _on("other_attention")


@contextmanager
def heard_by(listener: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """Call `listener(module)` for each layer whose attention is computed outside of a batch meanwhile."""
    switches.listeners.append(listener)
    try:
        yield
    finally:
        switches.listeners.remove(listener)
