"""A few of a model's weights, by which ranks find out that theirs are not the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from ...distributed.mesh import Ranks

PARAMETERS = 16
ELEMENTS = 16
ROUNDING = 16
"""How many units of rounding, of a parameter's largest element, ranks may be apart: they may sum gradients in other
orders."""


def sampled_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Some of a model's parameters, and some of those that are trained. Which ones goes by their order alone.

    None where FSDP1 wraps any, as each rank has its own part then.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return []
    everything = list(model.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    return _spread(everything, PARAMETERS) + _spread(trained, PARAMETERS)


def weights_differ(parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> bool:
    """Whether some elements of parameters differ between ranks by more than rounding does: the same answer on all.

    Every rank must call this, with as many parameters. Left out is what a rank has of its own or elsewhere: DTensors
    and other kinds of tensors, the empty parameters of DeepSpeed's ZeRO-3, and those on `meta`.
    """
    if not parameters:
        return False
    sample = torch.stack([_sample(parameter, ranks.device) for parameter in parameters])
    extremes = torch.stack([sample, -sample]).nan_to_num_(float("-inf"))
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=ranks.group)
    most, least = extremes[0], -extremes[1]
    largest = torch.maximum(most.abs(), least.abs()).where(most.isfinite(), 0).amax(dim=1, keepdim=True)
    rounding = [torch.finfo(p.dtype).eps if p.is_floating_point() else 0.0 for p in parameters]
    return bool((most - least > ROUNDING * largest * largest.new_tensor(rounding)[:, None]).any())


def _sample(parameter: torch.nn.Parameter, device: torch.device) -> torch.Tensor:
    """`[ELEMENTS]` in float64: elements of the parameter's last row, and NaN for those that are not here."""
    sample = torch.full((ELEMENTS,), float("nan"), dtype=torch.float64, device=device)
    weights = parameter.data
    if type(weights) is torch.Tensor and not weights.is_meta and not weights.is_complex() and weights.numel():
        while weights.dim() > 1:  # no copy is made of a whole weight, whatever its strides and dtype
            weights = weights[-1]
        elements = _spread(weights.reshape(-1), ELEMENTS)
        sample[: len(elements)] = elements.to(device, torch.float64)
    return sample


def _spread(items, most: int):
    """At most so many of a list or a vector, at equal distances and the last among them."""
    step = -(-len(items) // most) or 1
    return items[(len(items) - 1) % step :: step]
