"""Positions that a module counts itself, from the first token it is given: on a shard, from the wrong one."""

from __future__ import annotations

import torch

from ...compat import bloom_alibi
from ..active_batch import ActiveBatch


def corrected_query(module: torch.nn.Module, query: torch.Tensor, batch: ActiveBatch) -> torch.Tensor:
    """The query with a factor for each token's index in its row, where the layer has put one for that on this rank.

    Llama 4 raises the temperature of layers without RoPE with the index, whatever `position_ids` say.

    Args:
        query: `[B, H, S_local, D]`.
        batch: the current one.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query

    def factor(index: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((index.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    of_shard = torch.arange(query.shape[2], device=query.device)
    right = factor(batch.indices.to(query.device)).double() / factor(of_shard).double()
    return query * right[:, None, :, None].to(query.dtype)


def _bloom_alibi(module: torch.nn.Module, of_shard: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """The score biases of whole rows, which Bloom makes once for all layers: `[B * H, 1, S]`."""
    return bloom_alibi()(padding.to(of_shard.device), module.num_heads, of_shard.dtype)


def _ids_without_padding(module: torch.nn.Module, input_ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """The tokens of whole rows that Qwen 4's n-grams are made of, which end a segment at padding: `[B, S]`."""
    end = module.ple_embedding.eos_token_id
    return torch.where(padding.to(input_ids.device).bool(), input_ids, end)


def _distances(module: torch.nn.Module, of_shard: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """The distance of each query from each key of whole rows, which Inkling 2 makes once for all layers: `[S, S]`."""
    index = torch.arange(padding.shape[1], device=of_shard.device)
    return index[:, None] - index[None, :]


MADE_BY_MODEL = {
    ("BloomAttention", "alibi"): _bloom_alibi,
    ("Inkling2FullAttention", "relative_distance"): _distances,
    ("Inkling2SlidingAttention", "relative_distance"): _distances,
    ("Inkling2LoopFullAttention", "relative_distance"): _distances,
    ("Inkling2LoopSlidingAttention", "relative_distance"): _distances,
    ("Qwen4ExpTextPLELayer", "input_ids"): _ids_without_padding,
}
"""By class and argument: what makes for whole sequences what the model has made, of a shard, for all layers.

It takes the module, the argument as it is (resharded where it is by token), and `[B, S]`, 0 at padding.
"""
