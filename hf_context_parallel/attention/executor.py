"""Execution of a strategy: attention over the ranks of a group."""

from __future__ import annotations

from typing import Any

import torch

from ..distributed.messages import Exchange
from .heads import heads_of_groups
from .kernels.base import Kernel
from .ring import HeadGroup, planned_attention
from .scores import Scores
from .strategy import Strategy


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
    """Compute attention for tensors in the layout that models use.

    Args:
        query: `[B, H, S_local, D]`.
        key, value: `[B, H_kv, S_local, D]` and `[B, H_kv, S_local, D_v]`, of the same dtype.
        how: the other arguments of `attention`.

    Returns:
        `[B, S_local, H, D_v]`.
    """
    tensors = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    output = attention(*tensors, **how)
    return output.reshape(query.shape[0], query.shape[2], *output.shape[1:]).contiguous()  # models call view on it


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    strategy: Strategy,
    exchange: Exchange,
    kernel: Kernel,
    scores: Scores,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention of this rank's queries to the keys that they read, on all ranks.

    Args:
        query: `[T, H, D]`, the tokens of this rank, rows one after another.
        key, value: `[T, H_kv, D]` and `[T, H_kv, D_v]`, of the same dtype. H_kv divides H.
        exchange: the messages of the group.
        sinks: `[H]`, one more score for each head, with a value of 0 (learnable, `s_aux`).

    Returns:
        `[T, H, D_v]` in the dtype of `query`; 0 for tokens that read no key.

    Raises:
        ValueError: if the strategy needs more heads. All ranks raise it, since it depends on the shapes alone.
    """
    refusal = strategy.refusal(query.shape[1])
    if refusal:
        raise ValueError(f"{refusal}.")
    # All ranks have the same seed, so the rank is mixed in to make their dropout differ.
    scores = scores.of(strategy.rank)
    heads = heads_of_groups(query.shape[1], key.shape[1], strategy.inner, strategy.groups)
    how: dict[str, Any] = {"kernel": kernel, "sinks": sinks}
    parts = []
    if strategy.plan is not None:
        how |= {"scores": scores, "exchange": strategy.outer(exchange)}
        how["groups"] = [
            HeadGroup(own, keys, strategy.shared_heads(exchange, len(own), len(keys), query.device))
            for own, keys in heads
        ]
        parts.append(planned_attention(query, key, value, plan=strategy.plan, **how))
    how["groups"] = [HeadGroup(*each) for each in heads]
    if strategy.own is not None:
        how |= {"scores": scores.of("own"), "exchange": exchange}
        parts.append(planned_attention(query, key, value, plan=strategy.own, **how))
    if strategy.padding is not None:
        how |= {"scores": scores.of("padding"), "exchange": exchange}
        parts.append(planned_attention(query, key, value, plan=strategy.padding, **how))
    return sum(parts[1:], parts[0])  # each part is 0 at the tokens of the others


def one_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Convert the tensors to one dtype: the dtype of autocast if it is on, else the widest of their dtypes.

    Under autocast, queries and keys may be wider than values, in models whose norm or RoPE computes in float32.
    """
    device_type = tensors[0].device.type
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:  # autocast does not convert float64
        dtype = torch.get_autocast_dtype(device_type)
    return [tensor.to(dtype) for tensor in tensors]
