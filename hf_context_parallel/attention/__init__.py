"""The strategies that execute a plan: they move ranges of keys and call a kernel on tiles."""

from __future__ import annotations

import torch

from .p2p import ring_attention


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how) -> torch.Tensor:
    """Attention as models call it, by the strategies, which have tokens first.

    Args:
        query: `[B, H, S_local, D]`.
        key, value: `[B, H_kv, S_local, D]` and `[B, H_kv, S_local, D_v]`, of the same dtype.
        how: what `ring_attention` takes beside them.

    Returns:
        `[B, S_local, H, D_v]`.
    """
    tensors = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    output = ring_attention(*tensors, **how)
    return output.unflatten(0, (query.shape[0], query.shape[2])).contiguous()  # as SDPA's is: models view it


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
