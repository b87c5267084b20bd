"""Comparison of a sample of the weights between ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from ...distributed.mesh import Ranks

PARAMETERS = 16
ELEMENTS = 16
ROUNDING = 16
"""Allowed difference between ranks, in units of rounding of the largest sampled element of a parameter.

Ranks may sum gradients in different orders, so weights may differ by rounding.
"""


def sampled_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return some parameters of a model, and some of those that are trained. Their order alone decides which.

    The list is empty where FSDP1 wraps a module, since each rank then holds its own part.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return []
    everything = list(model.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    return _spread(everything, PARAMETERS) + _spread(trained, PARAMETERS)


def weights_differ(parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> bool:
    """Return whether elements of parameters differ between ranks by more than rounding. All ranks get the same answer.

    Every rank must call this, with the same number of parameters. Parameters that are not whole on this rank are left
    out: DTensors and other subclasses of tensors, the empty parameters of ZeRO-3 in DeepSpeed, and those on `meta`.
    """
    if not parameters:
        return False
    sample = torch.stack([_sample(parameter, ranks.device) for parameter in parameters])
    extremes = torch.stack([sample, -sample]).nan_to_num_(float("-inf"), float("inf"), float("-inf"))
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=ranks.group)
    most, least = extremes[0], -extremes[1]
    numbers = most.isfinite() & least.isfinite()
    largest = torch.maximum(most.abs(), least.abs()).where(numbers, 0).amax(dim=1, keepdim=True)
    rounding = [torch.finfo(p.dtype).eps if p.is_floating_point() else 0.0 for p in parameters]
    return bool((most - least > ROUNDING * largest * largest.new_tensor(rounding)[:, None]).any())


def _sample(parameter: torch.nn.Parameter, device: torch.device) -> torch.Tensor:
    """Return `[ELEMENTS]` in float64: elements of the last row of the parameter, and NaN for missing ones."""
    sample = torch.full((ELEMENTS,), float("nan"), dtype=torch.float64, device=device)
    weights = parameter.data
    if type(weights) is torch.Tensor and not weights.is_meta and not weights.is_complex() and weights.numel():
        while weights.dim() > 1:  # so that no whole weight is copied, whatever its strides and dtype
            weights = weights[-1]
        elements = _spread(weights.reshape(-1), ELEMENTS)
        # A weight that is no number is compared as infinity, so that it differs from numbers and from what is missing.
        sample[: len(elements)] = elements.to(device, torch.float64).nan_to_num(*[float("inf")] * 3)
    return sample


def _spread(items, most: int):
    """Return at most `most` items of a list or a vector, at equal distances, with the last among them."""
    step = -(-len(items) // most) or 1
    return items[(len(items) - 1) % step :: step]
