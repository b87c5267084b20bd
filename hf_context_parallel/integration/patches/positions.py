"""Correction of positions that a module counts itself, from the first token of its shard."""

from __future__ import annotations

import torch

from ...compat import bloom_alibi
from ...distributed.host import beside
from ..active_batch import ActiveBatch


def counts_tokens(module: torch.nn.Module) -> bool:
    """Return whether a layer has the attention temperature of Llama 4, which it takes from the index of a token."""
    return getattr(module, "attn_temperature_tuning", False) and not module.use_rope


def corrected_query(module: torch.nn.Module, query: torch.Tensor, batch: ActiveBatch) -> torch.Tensor:
    """Correct the attention temperature of Llama 4, which depends on the index of a token in its row.

    Layers without RoPE multiply the query by a factor of this index, and do not use `position_ids`. On a shard they
    take the index on the rank. Queries of other layers are returned as they are.

    Args:
        query: `[B, H, S_local, D]`.
        batch: the active batch.
    """
    if not counts_tokens(module):
        return query

    return query * batch.part(_Temperatures).right(module, query)


class _Temperatures:
    """Part of an active batch: the factors that correct queries, made once for all layers that scale alike."""

    def __init__(self, batch: ActiveBatch):
        self._indices = batch.indices
        self._made: dict[tuple, torch.Tensor] = {}

    def right(self, module: torch.nn.Module, query: torch.Tensor) -> torch.Tensor:
        """Return the right factor over that of the index on the rank, `[B, 1, S_local, 1]`."""
        key = module.floor_scale, module.attn_scale, query.device, query.dtype
        if key not in self._made:

            def factor(index: torch.Tensor) -> torch.Tensor:
                return torch.log1p(torch.floor((index.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

            of_shard = torch.arange(query.shape[2], device=query.device)
            right = factor(beside(self._indices, query)).double() / factor(of_shard).double()
            self._made[key] = right[:, None, :, None].to(query.dtype)
        return self._made[key]


def _bloom_alibi(module: torch.nn.Module, of_shard: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Make the score biases of whole rows for Bloom, `[B * H, 1, S]`. The model makes them once for all layers."""
    return bloom_alibi()(beside(padding, of_shard), module.num_heads, of_shard.dtype)


def _ids_without_padding(module: torch.nn.Module, input_ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Make the tokens of whole rows for the n-grams of Qwen 4, `[B, S]`. Padding ends a segment of n-grams."""
    end = module.ple_embedding.eos_token_id
    return torch.where(beside(padding, input_ids).bool(), input_ids, end)


def _distances(module: torch.nn.Module, of_shard: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Make the distances of queries from keys for Inkling 2, `[S, S]`. The model makes them once for all layers."""
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
"""Functions that make an argument of a module again for whole sequences, by class name and argument.

The model has made the argument from a shard, once for all layers. A function takes the module, the argument (resharded
if it holds a value for each token), and the padding mask `[B, S]`, 0 at padding.
"""
