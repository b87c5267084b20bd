"""Shards that were made before the batch was asked for, found again by the tensors of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..config import ContextParallelConfig
from ..distributed.host import ByTensor, beside, is_on_host, on_host
from .batch import CONSUMED, PADDING
from .shard import shard_batch

TARGETS = ("labels", "shift_labels")
DESCRIBING = tuple(name for name in (*PADDING, *CONSUMED) if name not in TARGETS)
"""Inputs of a decoder that its shard is made of."""


class _Ready(NamedTuple):
    """Shard of one rank.

    Args:
        others: the inputs of the batch beside its ids, tensors on the host and numbers. Each tensor comes with its
            version, and a number with None.
        made_for: settings and rank.
        local: what `shard_batch` returned.
    """

    others: dict[str, tuple[Any, int | None]]
    made_for: tuple[ContextParallelConfig, int]
    local: dict[str, Any]

    def is_of(self, others: Mapping[str, Any]) -> bool:
        """Return whether these are the inputs beside the ids, and no tensor was written since then."""
        return others.keys() == self.others.keys() and all(
            _is_same(others[name], *other) for name, other in self.others.items()
        )


def _is_same(given: Any, other: Any, version: int | None) -> bool:
    if version is None:
        return type(given) is type(other) and bool(given == other)
    return given is other and given._version == version


_ready: ByTensor[_Ready] = ByTensor()
"""Shards by the ids of their batches, on the host."""


def describing(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Take the inputs of a decoder out of a batch."""
    return {name: batch[name] for name in DESCRIBING if batch.get(name) is not None}


def keep_ready(batch: Mapping[str, Any], config: ContextParallelConfig, rank: int, local: dict[str, Any]) -> None:
    """Keep the shard of `describing(batch)` for as long as the batch lives.

    Args:
        batch: a batch on the host.
        local: what `shard_batch` returned for it.
    """
    inputs = describing(batch)
    tokens = inputs.pop("input_ids", None)
    tensors = [x for x in (tokens, *inputs.values()) if isinstance(x, torch.Tensor)]
    if tokens is None or any(x.is_inference() for x in tensors):
        return
    others = {name: (x, x._version if isinstance(x, torch.Tensor) else None) for name, x in inputs.items()}
    _ready.put(tokens, _Ready(others, (config, rank), local))


def shard_of(batch: Mapping[str, Any], config: ContextParallelConfig, rank: int) -> dict[str, Any]:
    """Shard the inputs of a decoder, as `shard_batch` does, or take the shard that is ready.

    Raises:
        ValueError: as `shard_batch`.
    """
    given = {name: value for name, value in batch.items() if value is not None}
    ready = _found(given)
    if ready is None or ready.made_for != (config, rank):
        return shard_batch(batch, config, rank)
    return {name: _copy(value, given["input_ids"]) for name, value in ready.local.items()}


def _found(given: Mapping[str, Any]) -> _Ready | None:
    """Find the shard of these inputs, if it is ready."""
    tokens = given.get("input_ids")
    if not isinstance(tokens, torch.Tensor) or "inputs_embeds" in given:
        return None
    ready = _ready.get(on_host(tokens))
    if ready is None:
        return None
    others = {name: on_host(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    del others["input_ids"]
    return ready if ready.is_of(others) else None


def _copy(value: Any, tokens: torch.Tensor) -> Any:
    """Copy a tensor to where the tokens are: a model may write to its inputs."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.clone() if is_on_host(tokens) else beside(value, tokens)
