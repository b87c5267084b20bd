"""Patch of the functions by which models encode media: each rank encodes a share, and features are deferred."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...compat import set_compiler
from ...cp_group import CPGroup, HasGroup
from ...distributed.agreement import collective, odd_rank
from ...distributed.mesh import Ranks, world
from ...distributed.process_groups import Groups
from ..checks.agreement import SAME_BATCHES, sample
from ..deferred import made
from ..outer_call import in_call, outer_call
from ..patches.module_patch import by_name
from .deferred_features import DeferredFeatures, Encoded
from .division import GRIDS, Division, divide
from .features import Parts, same_features
from .gathering import Placement

TOWERS = {
    "get_image_features": "vision_config",
    "get_video_features": "vision_config",
    "get_audio_features": "audio_config",
}
"""Functions that encode media, with the field that holds the configuration of the tower."""
UNTRIED, FOUND_EXACT, FAILED = range(3)
"""Results of a trial that ranks tell each other."""


class Border(Protocol):
    """Border of the decoder that takes the features."""

    cp: HasGroup


def share_towers(model: torch.nn.Module, decoder: torch.nn.Module, border: Border) -> bool:
    """Let the ranks of a group share what the towers of a model encode. A second call changes nothing.

    Args:
        model: the outermost Transformers model.
        decoder: its decoder.
        border: the border of the decoder.

    Returns:
        True if the model has towers.
    """
    patch, found = SharedTowers(decoder, border), False
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for name in TOWERS:
                if callable(getattr(module, name, None)):
                    patch.replace(module, name)
                    found = True
    return found


class SharedTowers:
    """Replaces the functions of models that encode media.

    In a call of a prepared model that is going to be sharded, the items are dealt to the ranks by their costs. Each
    rank encodes its share, and the function returns deferred features. A rank without an item encodes the cheapest
    one, so that all ranks take part in what hooks of towers do, and its parameters get a gradient of zero.

    Before the first call that can be divided comes a *trial*: some of its items are encoded whole and by shares, and
    the features are compared. What is not found equal runs whole on every rank from then on: arguments that are not
    known, features that cannot be told apart by items, and towers that mix items, draw random numbers or have
    statistics of batches.

    Args:
        decoder: the decoder, which is no part of a tower.
        border: its border.
    """

    def __init__(self, decoder: torch.nn.Module, border: Border):
        self._decoder, self._border = decoder, border
        self._steady: WeakKeyDictionary[torch.nn.Module, dict[bool, bool]] = WeakKeyDictionary()
        """True if a tower is the same function of each item, as far as its modules say, in training and outside."""
        self._exact: WeakKeyDictionary[torch.nn.Module, dict[str, bool]] = WeakKeyDictionary()
        """Results of trials, by function."""

    def __deepcopy__(self, memo: dict) -> SharedTowers:
        """Return this patch itself: a copy of a model is patched like the model."""
        return self

    def replace(self, module: PreTrainedModel, name: str) -> None:
        """Replace a function of a module, unless it was replaced before."""
        if name not in vars(module):
            function = getattr(module, name)
            setattr(module, name, update_wrapper(partial(self.run, module, name, function), function))

    @partial(torch.compiler.disable, recursive=False)
    def run(self, module: PreTrainedModel, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Encode media.

        Args:
            function: the function without the replacement.

        Raises:
            ValueError: on every rank alike, if one of them raised, or their items differ.
        """
        compiler = set_compiler(None)
        try:
            call, group = outer_call(), self._border.cp.group
            if call is None or call.is_alone:
                set_compiler(compiler)
                return function(*args, **kwargs)
            with in_call(None):  # masks that towers make are not those of the decoder
                output = None
                if group.size > 1 and self._is_steady(module):
                    output = self._shared(module, name, function, by_name(function, args, kwargs))
                return function(*args, **kwargs) if output is None else output
        finally:
            set_compiler(compiler)

    def _is_steady(self, module: PreTrainedModel) -> bool:
        """Return whether a tower is the same function of each item, as far as its modules say."""
        steady = self._steady.setdefault(module, {})
        if module.training not in steady:
            steady[module.training] = not self._varies(module)
        return steady[module.training]

    def _shared(self, module: PreTrainedModel, name: str, function: Callable, given: dict[str, Any]) -> Any:
        """Encode the share of this rank, and return the features of all items; None if the tower must run whole."""
        group, exact = self._border.cp.group.groups, self._exact.setdefault(module, {})
        with collective(group.same_batch, "batches or models", SAME_BATCHES) as notes:
            division = divide(given, next(iter(given), ""), getattr(module.config, TOWERS[name], None))
            notes.compare({"the tower": name, **_described(given, self._border.cp.group)})
            notes.number = UNTRIED if name not in exact else FOUND_EXACT if exact[name] else FAILED
        # Ranks that were in other groups before know of other trials.
        if FAILED in notes.numbers:
            exact[name] = False
        if division is None or len(division.costs) < 2 or exact.get(name) is False:
            return None
        if UNTRIED in notes.numbers:
            if _runs_in_step(module, group):
                exact[name] = division.patches is not None  # grids say what an item is
            else:
                exact[name] = _is_same(function, division.some(group.size), group)
        output = _encoded(function, division, group) if exact[name] else None
        exact[name] = output is not None
        return output

    def _varies(self, module: torch.nn.Module) -> bool:
        """Return whether a tower of a module draws random numbers in training, or has statistics of batches."""
        inside = {id(part) for part in self._decoder.modules()}
        parts = (part for part in module.modules() if id(part) not in inside and part.training)
        return any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) or _drops(part) for part in parts)


def _is_same(function: Callable, division: Division, group: Groups) -> bool:
    """Return whether the features of shares are those of the tower that runs whole."""
    state = _random_state(group.device)
    with torch.no_grad():
        found = made(_encoded(function, division, group))
        with collective(group.same_batch) as notes:
            expected = function(**division.given)
            notes.alarm = found is None or not same_features(found, expected)
    _restore(state, group.device)
    return not notes.alarm


def _encoded(function: Callable, division: Division, group: Groups) -> ModelOutput | None:
    """Encode the share of this rank, and return the features of all items; None if this is not exact.

    Raises:
        ValueError: on every rank alike, if one of them raised.
    """
    shares = division.shares(group.size)
    items = shares[group.rank] or [division.cheapest]
    parts, state = None, _random_state(group.device)
    with collective(group.same_batch) as notes:
        parts = _understood(function(**division.taken(items)), division, items)
        drawn = any(not torch.equal(a, b) for a, b in zip(state, _random_state(group.device)))
        notes.alarm, notes.number = parts is None or drawn, 0 if parts is None else parts.mark
    if parts is None or notes.alarm or odd_rank(notes.numbers) is not None:
        _restore(state, group.device)
        return None
    rows = _rows_of_all(parts, len(division.costs), shares[group.rank], group)
    placements = [Placement(shares, numbers, group) for numbers in rows]
    encoded = Encoded([part.values for part in parts], placements)
    return parts.joined([DeferredFeatures(encoded, number, numbers) for number, numbers in enumerate(rows)])


def _runs_in_step(module: torch.nn.Module, group: Groups) -> bool:
    """Return whether ranks of other groups run a tower in step with this one. They may have nothing to try."""
    sharded = any(isinstance(x, DTensor) or hasattr(x, "ds_id") for x in module.parameters())
    return sharded and group.same_batch.size < world().size


def _drops(module: torch.nn.Module) -> bool:
    """Return whether a module leaves out entries, features or layers at random in training."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any(isinstance(value, float) and value > 0 for name, value in vars(module).items() if "drop" in name)


def _described(given: dict[str, Any], group: CPGroup) -> dict[str, Any]:
    """Return what the ranks must have in common of the arguments of a tower: a sample, and the grids of items."""
    return {**sample(given, group), **{name: given[name] for name in GRIDS if given.get(name) is not None}}


def _understood(output: Any, division: Division, items: Sequence[int]) -> Parts | None:
    """Take an output apart; None if it is not clear which features are those of which item."""
    try:
        return Parts(output, division, items)
    except ValueError:
        return None


def _rows_of_all(parts: Parts, count: int, mine: Sequence[int], ranks: Ranks) -> list[list[int]]:
    """Gather the number of rows of each of `count` items, for each part."""
    rows = torch.zeros(len(parts), count, dtype=torch.int64)
    for number, part in enumerate(parts):
        for item, length in zip(mine, part.rows):
            rows[number, item] = length
    rows = rows.to(ranks.device)
    dist.all_reduce(rows, group=ranks.group)
    numbers: list[list[int]] = rows.tolist()
    return numbers


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the generators of the host and of a device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _restore(state: Sequence[torch.Tensor], device: torch.device) -> None:
    """Set the states of the generators of the host and of a device."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
