"""Attention of one layer on the shard of a batch."""

from __future__ import annotations

import torch

from ...planning.mask import Pattern
from ..active_batch import ActiveBatch
from ..model_registry import TEXT_ALONE


def sharded_attention(
    batch: ActiveBatch,
    layer: str,
    index: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    pattern: Pattern,
    scaling: float | None,
    softcap: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute attention of the queries of a shard to the keys of all shards: `[B, S_local, H, D_v]`.

    Args:
        batch: the active batch.
        layer: the class name of the layer.
        index: the number of the layer in the model, or None if it has none.
        sinks: `[H]`, or None.
        pattern: the keys that a token reads.

    The other arguments are those of `context_parallel_attention`.

    Raises:
        ValueError: if the layer has tokens that are not those of the shard, or the kernel cannot compute it.
    """
    _check_lengths(batch, query, key)
    batch.note(layer, "ring")
    deterministic = torch.are_deterministic_algorithms_enabled()
    call = batch.group.prepare(
        query, key, value, scale=scaling, softcap=softcap, dropout_p=dropout, deterministic=deterministic
    )
    strategy = batch.strategy(index, pattern, call.shape, query.device)
    return batch.group.attend(call, strategy, sinks)


def _check_lengths(batch: ActiveBatch, query: torch.Tensor, key: torch.Tensor) -> None:
    expected = batch.shard.local_shape
    for name, tensor in (("queries", query), ("keys", key)):
        found = (tensor.shape[0], tensor.shape[2])
        if found != expected:
            raise ValueError(
                f"a layer has {found[0]} rows of {found[1]} {name}, and the shard has {expected[0]} rows of "
                f"{expected[1]}. Load a part that does not see the text, such as a vision tower, with "
                f"attn_implementation={TEXT_ALONE}. In cp.shard, leave out what adds tokens: prompt tuning, caches, "
                "generate()."
            )
