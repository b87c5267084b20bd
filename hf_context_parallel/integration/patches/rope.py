"""RoPE whose frequencies depend on the length of a sequence, which a shard does not show.

Dynamic NTK and LongRoPE choose their frequencies by the largest position that they are given. Here they are given one
more position: the largest of the batch, or of the document where rows are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compat import tree_map
from ...data.shard import Shard
from ...distributed.host import beside
from ..active_batch import ActiveBatch
from .module_patch import BatchPatch


def follows_length(module: torch.nn.Module) -> bool:
    """Return whether a module computes RoPE with frequencies that depend on the length."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)


class RopeByLength:
    """Part of an active batch: it gives RoPE modules the lengths of the whole rows or documents."""

    def __init__(self, batch: ActiveBatch):
        self._batch = batch

    def run(
        self,
        module: torch.nn.Module,
        forward: Callable,
        turn: int,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        layer_type: str | None = None,
    ) -> Any:
        """Compute the frequencies at `position_ids`, `[B, S_local]`, as one process would."""
        options = {} if layer_type is None else {"layer_type": layer_type}
        kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
        lengths = _same_frequencies(module, kind, layer_type, self._batch.shard)
        result = None
        for length in lengths.unique().tolist():
            last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
            # Positions of longer documents would be the largest, so they are clamped. Their results are not kept.
            part = forward(x, torch.cat([position_ids.clamp(max=length - 1), last], dim=-1), **options)
            part = tree_map(lambda tensor: tensor[..., :-1, :], part)
            chosen = beside((lengths == length)[..., None], x)
            result = part if result is None else _where(chosen, part, result)
        return result


class RopePatch(BatchPatch):
    """Gives RoPE modules the lengths of whole rows or documents while a batch is active."""

    part = RopeByLength


def _where(chosen: torch.Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, torch.Tensor):
        return torch.where(chosen, new, old)
    return tuple(torch.where(chosen, a, b) for a, b in zip(new, old))


def _same_frequencies(module, kind: str, layer_type: str | None, shard: Shard) -> torch.Tensor:
    """Return the `lengths` of the shard, where lengths with the same frequencies are replaced by one of them.

    Raises:
        ValueError: on all ranks, if the frequencies of a document would depend on the documents before it.
    """
    lengths = shard.lengths
    parameters = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
    original = parameters.get("original_max_position_embeddings") or module.original_max_seq_len
    if kind == "longrope":  # it has two sets of frequencies
        long = lengths > original
        return torch.where(long, lengths.max(), lengths.clamp(max=original))
    if len(shard.all_lengths) > 1 and max(shard.all_lengths) > original:
        raise ValueError(
            f"rope_type={kind!r} remembers the longest sequence that it has seen, so its result for packed documents "
            f"of more than {original} tokens depends on their order. Do not pack, or use another rope_type, such as "
            "'yarn' or 'longrope'."
        )
    return lengths
