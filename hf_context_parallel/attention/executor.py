"""Attention of a group's ranks: a strategy says what is computed and what travels, and it is done here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..distributed.messages import Exchange
from .kernels.base import Kernel
from .ring import planned_attention
from .scores import Scores
from .strategy import Strategy


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
    """Attention as models call it.

    Args:
        query: `[B, H, S_local, D]`.
        key, value: `[B, H_kv, S_local, D]` and `[B, H_kv, S_local, D_v]`, of the same dtype.
        how: what `attention` takes beside them.

    Returns:
        `[B, S_local, H, D_v]`.
    """
    tensors = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    output = attention(*tensors, **how)
    return output.reshape(
        query.shape[0], query.shape[2], *output.shape[1:]
    ).contiguous()  # as SDPA's is: models view it


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
    guard: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of all ranks that they read.

    Args:
        query: `[T, H, D]`, this rank's tokens, rows one after another.
        key, value: `[T, H_kv, D]` and `[T, H_kv, D_v]`, of the same dtype. H_kv divides H.
        exchange: the group's messages.
        sinks: `[H]`, a score a head beside those of the keys, whose value is 0 (learnable, `s_aux`).
        guard: called before backward; raises if the batch is no longer the one being computed.

    Returns:
        `[T, H, D_v]` in the dtype of `query`; 0 for tokens that the plan computes nothing for.

    Raises:
        ValueError: if the strategy cannot deal so many heads; on every rank, as it depends on the shapes alone.
    """
    refusal = strategy.refusal(query.shape[1])
    if refusal:
        raise ValueError(f"{refusal}.")
    # Ranks are seeded alike: what tells their weights apart is the rank.
    scores = scores.of(strategy.rank)
    how: dict[str, Any] = {"kernel": kernel, "sinks": sinks, "guard": guard}
    parts = []
    if strategy.plan is not None:
        shared = strategy.shared_heads(exchange, query.shape[1], key.shape[1], query.device)
        how |= {"scores": scores, "exchange": strategy.outer(exchange)}
        parts.append(planned_attention(query, key, value, plan=strategy.plan, shared=shared, **how))
    if strategy.own is not None:
        how |= {"scores": scores.of("own"), "exchange": exchange}
        parts.append(planned_attention(query, key, value, plan=strategy.own, **how))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]  # tokens of one are 0 in the other


def one_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in one dtype, as attention wants them: autocast's where it is on, else the widest of theirs.

    Under autocast, models whose norm or RoPE computes in float32 hand over queries and keys wider than the values.
    """
    device_type = tensors[0].device.type
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device_type)
    return [tensor.to(dtype) for tensor in tensors]
