"""Comparison of weights between ranks: all of them by checksums once, and a sample of them for each batch.

Buffers are not compared. Some hold infinity on purpose, as masks do, or statistics that each rank updates by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from ...distributed.agreement import agreed_error, gather_numbers
from ...distributed.mesh import Ranks

PARAMETERS = 16
ELEMENTS = 16
ROUNDING = 16
"""Allowed difference between ranks, in units of rounding of the largest compared element of a parameter.

Ranks may sum gradients in different orders, so weights may differ by rounding.
"""
CHUNK = 1 << 21
"""Bytes of a parameter that are copied at a time."""
NAMED = 3
"""Number of parameters that an error names."""
NONE = torch.iinfo(torch.int64).min
"""Checksum of a parameter of which a rank holds nothing."""

Items = TypeVar("Items", torch.Tensor, Sequence[str])


def packing_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """List the linear layers of bitsandbytes whose weights pack numbers of four bits."""
    # `hasattr` would take microseconds of each module that lacks it, for each batch.
    return [module for module in model.modules() if "quant_state" in vars(module)]


def numbers_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a model by name, without those of bitsandbytes that pack numbers of four bits.

    For FSDP these have a floating dtype, in which their bits may look like NaN.
    """
    packed = {module.weight for module in packing_modules(model)}
    return {name: parameter for name, parameter in model.named_parameters() if parameter not in packed}


def compared_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a model that ranks compare, by name.

    There are none where FSDP1 wraps a module, since each rank then holds its own part.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return {}
    return numbers_of(model)


def sampled_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return some parameters of a model, and some of those that are trained. Their order alone decides which."""
    everything = compared_parameters(model)
    trained = [name for name, parameter in everything.items() if parameter.requires_grad]
    names = dict.fromkeys([*_spread(list(everything), PARAMETERS), *_spread(trained, PARAMETERS)])
    return {name: everything[name] for name in names}


def weights_differ(parameters: Mapping[str, torch.nn.Parameter], ranks: Ranks) -> tuple[bool, bool]:
    """Compare a sample of the elements of parameters between ranks. All ranks get the same answer.

    Every rank must call this, with the same number of parameters. Of a DTensor, ranks that hold the same part are
    compared. Left out are other subclasses of tensors, the empty parameters of ZeRO-3 in DeepSpeed, and those on
    `meta`.

    Returns:
        Whether elements differ by more than rounding, and whether an element is not finite on any rank.
    """
    if not parameters:
        return False, False
    sample, present = (torch.stack(x) for x in zip(*(_sample(p, ranks.device) for p in parameters.values())))
    finite = sample.isfinite()
    extremes = torch.stack([sample, -sample, (present & ~finite).double()])
    extremes[:2].masked_fill_(~(present & finite), float("-inf"))
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=ranks.group)
    most, least = extremes[0], -extremes[1]
    same, most, least = most[:, :1] == least[:, :1], most[:, 1:], least[:, 1:]
    largest = torch.maximum(most.abs(), least.abs()).where(most.isfinite(), 0).amax(dim=1, keepdim=True)
    rounding = [_rounding(parameter) for parameter in parameters.values()]
    apart = (same & (most - least > largest * largest.new_tensor(rounding)[:, None])).any()
    differ, broken = torch.stack([apart, extremes[2].any()]).tolist()
    return differ, broken


def compare_all(parameters: Mapping[str, torch.nn.Parameter], ranks: Ranks) -> None:
    """Compare parameters between ranks: their bits by checksums, and where these differ their values.

    Every rank must call this, with parameters of the same names, shapes and dtypes. It compares those that
    `weights_differ` compares.

    Raises:
        ValueError: on every rank alike, if a parameter differs by more than rounding or is not finite.
    """
    if not parameters:
        return
    sums, broken = (torch.stack(x) for x in zip(*(_checksum(p, ranks.device) for p in parameters.values())))
    inverse = torch.where(sums == NONE, NONE, ~sums)
    parts = sums.new_tensor([_part(parameter) for parameter in parameters.values()])
    most = torch.stack([sums, inverse, broken.to(torch.int64), parts, -parts])
    dist.all_reduce(most, dist.ReduceOp.MAX, group=ranks.group)
    same = most[3] == -most[4]
    differs, broken = torch.stack([same & (most[0] != ~most[1]) & (most[0] != NONE), most[2] > 0]).tolist()
    refuse_non_finite({name: p for (name, p), wrong in zip(parameters.items(), broken) if wrong}, ranks)
    names = [name for name, wrong in zip(parameters, differs) if wrong]
    for name in names:
        refuse_difference(name, parameters[name], ranks, f"{len(names)} of {len(parameters)}")


def refuse_non_finite(parameters: Mapping[str, torch.nn.Parameter], ranks: Ranks) -> None:
    """Refuse parameters that hold NaN or infinity on any rank. Every rank must call this with the same parameters.

    Raises:
        ValueError: on every rank alike, naming parameters, ranks and numbers of elements.
    """
    counts = gather_numbers(ranks, *(non_finite(parameter) for parameter in parameters.values()))
    found = {name: of_ranks for name, of_ranks in zip(parameters, counts) if any(of_ranks)}
    if not found:
        return
    lines = []
    for name, of_ranks in list(found.items())[:NAMED]:
        where = f"{max(of_ranks):,} of its {parameters[name].numel():,} elements"
        if not all(of_ranks) or len(set(of_ranks)) > 1:
            where = ", ".join(f"{count:,} elements on rank {rank}" for rank, count in enumerate(of_ranks) if count)
        lines.append(f"{name} ({where})")
    more = len(found) - len(lines)
    raise agreed_error(
        f"{', '.join(lines)}{f' and {more} more parameters' if more else ''} "
        f"{'hold' if len(found) > 1 else 'holds'} NaN or infinite weights, so that nothing can be computed. Load the "
        "model again. If training made them so, go on from an earlier checkpoint with a lower learning rate.",
        ranks,
    )


def refuse_difference(name: str, parameter: torch.nn.Parameter, ranks: Ranks, share: str = "") -> None:
    """Refuse a parameter whose values on a rank differ from those of rank 0 by more than rounding.

    Every rank must call this. Each chunk of the values of rank 0 is sent to all ranks.

    Args:
        share: how many parameters have other bits, if it is known.

    Raises:
        ValueError: on every rank alike, naming the parameter, the rank and an element.
    """
    weights = _held(parameter)
    present, parts = gather_numbers(ranks, weights is not None, _part(parameter))
    if weights is None or not all(present) or len(set(parts)) > 1:
        return
    furthest, largest, start = torch.zeros(4, dtype=torch.float64), 0.0, 0
    for chunk in _chunks(weights):
        mine = chunk.to(ranks.device, torch.float64)
        theirs = mine.clone()
        dist.broadcast(theirs, group=ranks.group, group_src=0)
        apart, place = (mine - theirs).abs().max(dim=0)
        largest = max(largest, float(torch.maximum(mine.abs(), theirs.abs()).max()))
        if apart > furthest[0]:
            furthest = torch.stack([apart, start + place.double(), theirs[place], mine[place]]).cpu()
        start += len(chunk)
    found = torch.zeros(ranks.size, 5, dtype=torch.float64)
    found[ranks.rank] = torch.cat([furthest, furthest.new_tensor([largest])])
    found = found.to(ranks.device)
    dist.all_reduce(found, group=ranks.group)
    bound = _rounding(parameter) * float(found[:, 4].max())
    for rank, (difference, place, first, other, _) in enumerate(found.tolist()):
        if difference > bound:
            index = [int(i) for i in torch.unravel_index(torch.tensor(int(place)), weights.shape)]
            place = f"{name}{index}{' of its shard' if parts[0] else ''}"
            raise different_weights(
                f"{place} is {first:g} on rank 0 and {other:g} on rank {rank}"
                f"{f' ({share} parameters have other bits)' if share else ''}",
                ranks,
            )


def different_weights(what: str, ranks: Ranks) -> ValueError:
    """Return the error of ranks whose weights differ."""
    return agreed_error(
        f"the ranks of the group have different weights: {what}. Together they would compute no single model. Seed "
        "all ranks alike before the model is made, or load it, and reduce gradients over all ranks before each step "
        "of the optimizer; DistributedDataParallel and ContextParallelTrainer do both.",
        ranks,
    )


def non_finite(parameter: torch.Tensor) -> int:
    """Count the elements that are NaN or infinite. Of a DTensor those of this rank count."""
    weights = _held(parameter)
    if weights is None or not weights.is_floating_point():
        return 0
    return sum(int((~chunk.float().isfinite()).sum()) for chunk in _chunks(weights))


def _held(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return what this rank holds of a parameter, or None if that is no plain tensor with elements."""
    weights = parameter.data
    if isinstance(weights, DTensor):
        weights = weights.to_local()
    plain = type(weights) is torch.Tensor and not weights.is_meta and not weights.is_complex()
    return weights if plain and weights.numel() > 0 else None


def _part(parameter: torch.Tensor) -> int:
    """Return the number of the part of a parameter that this rank holds, or 0 if it holds all of it."""
    if not isinstance(parameter, DTensor):
        return 0
    part = 0
    mesh, place = parameter.device_mesh, parameter.device_mesh.get_coordinate() or ()
    for size, mine, placement in zip(mesh.shape, place, parameter.placements):
        if not placement.is_replicate():
            part = part * size + mine + 1
    return part


def _rounding(parameter: torch.nn.Parameter) -> float:
    """Return the allowed difference between ranks, relative to the largest element."""
    return ROUNDING * torch.finfo(parameter.dtype).eps if parameter.is_floating_point() else 0.0


def _chunks(weights: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield all elements of a tensor in order, `CHUNK` bytes at a time, as vectors."""
    most = CHUNK // weights.element_size()
    if weights.is_contiguous():
        yield from weights.view(-1).split(most)
    elif weights.numel() <= most:
        yield weights.reshape(-1)
    else:  # so that no whole weight is copied, whatever its strides
        for part in weights:
            yield from _chunks(part)


@cache
def _factors(device: torch.device) -> torch.Tensor:
    """Return odd random numbers, the same on all ranks, by which the words of a chunk are multiplied."""
    made = torch.randint(-(1 << 62), 1 << 62, (CHUNK,), generator=torch.Generator().manual_seed(0))
    return (made | 1).to(device)


def _checksum(parameter: torch.nn.Parameter, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a checksum of the bits of a parameter, which depends on their order, and whether it may not be finite.

    Both are computed where the parameter lies, and nobody waits for them.

    Returns:
        An int64 that is `NONE` for a parameter of which this rank holds nothing, and a bool.
    """
    total = torch.full((), NONE, dtype=torch.int64, device=device)
    broken = torch.zeros((), dtype=torch.bool, device=device)
    weights = _held(parameter)
    if weights is None:
        return total, broken
    total, size = torch.zeros((), dtype=torch.int64, device=weights.device), weights.element_size()
    suspect = torch.zeros((), dtype=torch.bool, device=weights.device)
    for chunk in _chunks(weights):
        fits = chunk.numel() * size % 8 == 0 and chunk.storage_offset() * size % 8 == 0
        words = chunk.view(torch.int64 if fits else _INTEGERS[size])
        total = total * _STEP + (words * _factors(weights.device)[: len(words)]).sum()
        if weights.is_floating_point():  # a sum is NaN or infinite if an element is
            values = chunk.float() if size == 1 else chunk
            suspect |= ~values.sum(dtype=torch.float64 if size == 8 else torch.float32).isfinite()
    return total.clamp(min=NONE + 1).to(device), suspect.to(device)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of so many bytes."""
_STEP = 6364136223846793005
"""Odd number by which the checksum of the chunks before is multiplied."""


def _sample(parameter: torch.nn.Parameter, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part of a parameter that is held and elements of its last row, and a mask of those that exist.

    Both are of shape `[1 + ELEMENTS]`, the first in float64.
    """
    sample = torch.zeros(1 + ELEMENTS, dtype=torch.float64, device=device)
    sample[0] = _part(parameter)
    count = 0
    weights = _held(parameter)
    if weights is not None:
        while weights.dim() > 1:  # so that no whole weight is copied, whatever its strides and dtype
            weights = weights[-1]
        elements = _spread(weights.reshape(-1), ELEMENTS)
        count = len(elements)
        sample[1 : 1 + count] = elements.to(device, torch.float64)
    return sample, torch.arange(1 + ELEMENTS, device=device) <= count


def _spread(items: Items, most: int) -> Items:
    """Return at most `most` items of a list or a vector, at equal distances, with the last among them."""
    step = -(-len(items) // most) or 1
    return items[(len(items) - 1) % step :: step]
