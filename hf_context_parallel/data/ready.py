"""Shards that were made before the batch was asked for, found again by the tensors of the batch."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..config import ContextParallelConfig
from ..distributed.host import beside, is_on_host, on_host
from .batch import CONSUMED, PADDING
from .shard import shard_batch

TARGETS = ("labels", "shift_labels")
DESCRIBING = tuple(name for name in (*PADDING, *CONSUMED) if name not in TARGETS)
"""Inputs of a decoder that its shard is made of."""


class _Ready(NamedTuple):
    """Shard of one rank.

    Args:
        tokens: the ids of the batch, on the host.
        others: its other tensors, on the host.
        versions: the versions of all its tensors, by name.
        made_for: settings and rank.
        local: what `shard_batch` returned.
    """

    tokens: weakref.ref[torch.Tensor]
    others: dict[str, torch.Tensor]
    versions: dict[str, int]
    made_for: tuple[ContextParallelConfig, int]
    local: dict[str, Any]

    def is_of(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Return whether these are the tensors of the batch, and none was written since then."""
        if inputs.keys() != self.versions.keys() or inputs["input_ids"] is not self.tokens():
            return False
        same = all(inputs[name] is other for name, other in self.others.items())
        return same and all(inputs[name]._version == version for name, version in self.versions.items())


_ready: dict[int, _Ready] = {}
"""By the id of the tokens on the host. An entry goes with them."""


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
    if tokens is None or any(x.is_inference() for x in (tokens, *inputs.values())):
        return
    key = id(tokens)
    reference = weakref.ref(tokens, lambda _: _ready.pop(key, None))
    versions = {name: x._version for name, x in (("input_ids", tokens), *inputs.items())}
    _ready[key] = _Ready(reference, inputs, versions, (config, rank), local)


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
    readable = given.keys() <= set(DESCRIBING) - {"inputs_embeds"}
    if "input_ids" not in given or not readable or not all(isinstance(x, torch.Tensor) for x in given.values()):
        return None
    inputs = {name: on_host(value) for name, value in given.items()}
    ready = _ready.get(id(inputs["input_ids"]))
    return ready if ready is not None and ready.is_of(inputs) else None


def _copy(value: Any, tokens: torch.Tensor) -> Any:
    """Copy a tensor to where the tokens are: a model may write to its inputs."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.clone() if is_on_host(tokens) else beside(value, tokens)
