"""A few of a model's weights, by which ranks find out that theirs are not the same."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

MOST_PARAMETERS = 16
MOST_ELEMENTS = 16

T = TypeVar("T")


def sample_weights(model: torch.nn.Module) -> torch.Tensor:
    """Some elements of some parameters, and of some that are trained: `[n]` in float64, on the CPU.

    Parameters of which each rank holds its own part are left out: DTensors and other kinds of tensors, the empty ones
    of DeepSpeed's ZeRO-3, and all of FSDP1.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return torch.empty(0, dtype=torch.float64)
    whole = [p for p in model.parameters() if type(p.data) is torch.Tensor and not p.is_meta and p.numel()]
    trained = [p for p in whole if p.requires_grad]
    parts = [
        _spread(p.detach().reshape(-1), MOST_ELEMENTS)
        for p in _spread(whole, MOST_PARAMETERS) + _spread(trained, MOST_PARAMETERS)
    ]
    # On their device, so that the host waits for it once.
    return (
        torch.cat([part.to(parts[0].device, torch.float64) for part in parts]).cpu()
        if parts
        else torch.empty(0, dtype=torch.float64)
    )


def _spread(items: T, most: int) -> T:
    """At most so many of a list or a tensor, at equal distances and the last among them."""
    step = -(-len(items) // most) or 1
    return items[(len(items) - 1) % step :: step]
