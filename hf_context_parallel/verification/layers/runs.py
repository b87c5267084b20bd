"""Runs that are compared: on whole sequences, and on shards with the same inputs for each module."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import GradientCheckpointingLayer

from ...integration.border.parallelize import whole
from ...integration.checks.inputs import accepted
from ...integration.mixers.recognise import mixers
from ...integration.model_registry import transformers_model
from ...integration.switches import computed_otherwise, heard_by, sharded_on_one_rank
from .batches import Batch
from .modules import INPUT, OUTPUT, hidden_output, hidden_states, replaced, run_alone, stock_forwards, take

MARGIN = 8.0
"""Allowed difference of a shard, in units of the difference between two implementations of Transformers."""
FLOOR = 8.0
"""Difference that is always allowed, in units of the dtype's epsilon times the largest entry."""
MOST = 0.75
"""Share of the tokens that is compared in layers with experts. Other tokens may be routed to other experts."""
ROUTED = re.compile(r".*(Expert|MoE|MOE|Moe|Router).*")
"""Class names of the modules of layers with experts."""

TRAINED_ANYWAY = "A model of the table trains without this comparison with ContextParallelConfig(verify=False)."
"""Remedy of what cannot be compared, or differs. A model that no table has is compared whatever the settings say."""


class Difference(NamedTuple):
    """Difference of a layer on shards from the layer on whole sequences, for the same inputs.

    Args:
        layer: the name of the module in the Transformers model.
        tensor: the tensor that is compared: `"input"`, `"output"`, or `"input gradient"` for a random gradient of the
            output.
        batch: `"packed"` or `"padded"`.
        found: the largest difference on any rank, relative to the largest entry of the tensor.
        bound: the largest difference that rounding explains.
    """

    layer: str
    tensor: str
    batch: str
    found: float
    bound: float


@dataclass
class _Record:
    """Record of a module's call on whole sequences: this rank's tokens of its input, output and input gradient.

    Args:
        shares: by tensor, this rank's tokens of each piece of the batch, `[B, S_piece_local, ...]`.
        rounding: by tensor, for each piece, the difference between two implementations for each token, `[tokens]`.
        largest: by tensor, its largest entry.
        epsilon: the epsilon of the dtype that the module computes in.
    """

    shares: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    rounding: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    epsilon: float = 0.0

    def share(self, name: str) -> torch.Tensor | None:
        """Return this rank's tokens of a tensor, `[B, S_local, ...]`, or None if there is no such tensor."""
        return torch.cat(self.shares[name], dim=1) if name in self.shares else None


class _Watch(ABC):
    """Run of the model with hooks that inspect each mixer and each layer after its call.

    Args:
        model: the model, with its wrappers.
        batch: the batch that it gets.
    """

    def __init__(self, model: torch.nn.Module, batch: Batch):
        self.model, self.batch = model, batch
        self.inner = transformers_model(model)
        self.resharded = set(mixers(self.inner))
        hidden = {part for module in self.resharded for part in module.modules()} - self.resharded
        self.hidden = hidden
        # A module that sees whole sequences is compared as a unit, without the modules inside.
        self.layers = [
            module
            for module in self.inner.modules()
            if isinstance(module, GradientCheckpointingLayer) and module not in hidden | self.resharded
        ]
        self._busy = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the hooks for a run."""
        with ExitStack() as stack:
            hooks = [module.register_forward_pre_hook(self._begun, with_kwargs=True) for module in self.layers]
            hooks.append(register_module_forward_hook(self._done, with_kwargs=True))
            for hook in hooks:
                stack.callback(hook.remove)
            yield

    def _begun(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        return None if self._busy else self.begun(module, args, kwargs)

    def _done(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._busy or not self.is_watched(module):
            return
        self._busy = True  # hooks ignore the calls that `done` makes itself
        try:
            self.done(module, args, kwargs, output)
        finally:
            self._busy = False

    @abstractmethod
    def is_watched(self, module: torch.nn.Module) -> bool:
        """Return True if `done` is to be called for a module."""

    @abstractmethod
    def begun(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Inspect the arguments of a layer before its call, and return other arguments for it, or None."""

    @abstractmethod
    def done(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Inspect a mixer or a layer after its call."""


class Whole(_Watch):
    """Run on whole sequences, one document at a time."""

    def __init__(self, model: torch.nn.Module, batch: Batch):
        super().__init__(model, batch)
        self._mixers = set(self.resharded)
        self._records: dict[torch.nn.Module, list[_Record]] = {}

    def run(self) -> dict[torch.nn.Module, list[_Record]]:
        """Run the model, and return the records of each module's calls. Modules are in the order of their calls."""
        with self.watching(), whole(self.model), heard_by(self._hear), stock_forwards(self.resharded):
            for piece in self.batch.pieces:
                self._piece, self._begun_calls, self._done_calls = piece, {}, {}
                with torch.no_grad():
                    self.model(**self._inputs())
        return self._records

    def _inputs(self) -> dict[str, Any]:
        """Build the inputs of a piece, without `position_ids` and `use_cache` if the model does not accept them."""
        inputs = {name: value[:, self._piece] for name, value in self.batch.inputs.items()} | {"use_cache": False}
        refused = {"position_ids", "use_cache"} - set(accepted(self.inner, ("position_ids", "use_cache")))
        return {name: value for name, value in inputs.items() if name not in refused}

    def _hear(self, module: torch.nn.Module) -> None:
        if module not in self.hidden:
            self._mixers.add(module)

    def is_watched(self, module: torch.nn.Module) -> bool:
        return module in self._mixers or module in self.layers

    def begun(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        hidden = hidden_states(args, kwargs, self._shape)
        if hidden is not None:
            self._keep(self._record(module, self._begun_calls), {INPUT: take(args, kwargs, hidden)})

    def done(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        record = self._record(module, self._done_calls)
        hidden = hidden_states(args, kwargs, self._shape)
        is_layer = module in self.layers
        if hidden is not None and not is_layer:
            self._keep(record, {INPUT: take(args, kwargs, hidden)})
        weigh = None if is_layer else self._weigh
        if is_layer:
            result = hidden_output(output, self._shape)
            first = {} if result is None else {OUTPUT: result}
        else:
            first = run_alone(module, args, kwargs, hidden, self._shape, weigh)
        x = None if hidden is None else take(args, kwargs, hidden)
        tensors = [*first.values()] if x is None else [*first.values(), x]
        record.epsilon = max([0.0, *map(_epsilon, tensors)])
        if x is not None and (is_layer or module in self.resharded):
            # On a shard this module runs the same code, but its input may differ in the last bit.
            signs = self.batch.draw(x, self._piece).sign()
            args, kwargs = replaced(args, kwargs, hidden, x + record.epsilon * signs * x)
        with computed_otherwise():
            second = run_alone(module, args, kwargs, hidden, self._shape, weigh)
        self._keep(record, first)
        real = self.batch.real[:, self._piece]
        for name in first.keys() & second.keys():
            record.rounding.setdefault(name, []).append(_by_token(first[name], second[name], real))

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.batch.real), self._piece.stop - self._piece.start

    def _weigh(self, output: torch.Tensor) -> torch.Tensor:
        return self.batch.draw(output, self._piece)

    def _record(self, module: torch.nn.Module, calls: dict[torch.nn.Module, int]) -> _Record:
        """Return the record of the present call, and count the call."""
        number = calls[module] = calls.get(module, -1) + 1
        records = self._records.setdefault(module, [])
        if number == len(records):
            records.append(_Record())
        return records[number]

    def _keep(self, record: _Record, tensors: dict[str, torch.Tensor]) -> None:
        mine, real = self.batch.mine(self._piece), self.batch.real[:, self._piece]
        for name, tensor in tensors.items():
            record.shares.setdefault(name, []).append(tensor[:, mine.to(tensor.device)])
            entries = tensor[real.to(tensor.device)]
            record.largest[name] = max(record.largest.get(name, 0.0), float(entries.abs().max()))


class Sharded(_Watch):
    """Run on shards, in which each layer and each mixer gets the inputs of the run on whole sequences."""

    def __init__(self, model: torch.nn.Module, batch: Batch, records: dict[torch.nn.Module, list[_Record]]):
        super().__init__(model, batch)
        self._records = records
        self._names = {module: name for name, module in self.inner.named_modules()}
        self._begun_calls: dict[torch.nn.Module, int] = {}
        self._done_calls: dict[torch.nn.Module, int] = {}
        self._differences: list[Difference] = []
        self._shape = len(batch.real), len(batch.columns)

    def run(self) -> list[Difference]:
        """Run the model, and return the differences on this rank."""
        with torch.no_grad(), sharded_on_one_rank(), self.watching():
            self.model(**self.batch.inputs)
        for module, records in self._records.items():
            if self._done_calls.get(module, -1) + 1 != len(records):
                raise RuntimeError(
                    f"{self._names[module]} is called {len(records)} times on whole sequences and "
                    f"{self._done_calls.get(module, -1) + 1} times on shards, so it cannot be compared. "
                    f"{TRAINED_ANYWAY}"
                )
        return self._differences

    def is_watched(self, module: torch.nn.Module) -> bool:
        return module in self._records

    def begun(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        is_first = not self._begun_calls
        record = self._record(module, self._begun_calls)
        hidden, expected = hidden_states(args, kwargs, self._shape), record.share(INPUT)
        if hidden is None or expected is None:
            return None
        if is_first:
            self._compare(module, record, {INPUT: take(args, kwargs, hidden)})
        return replaced(args, kwargs, hidden, expected)

    def done(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        record = self._record(module, self._done_calls)
        if module in self.layers:
            self._compare(module, record, {OUTPUT: hidden_output(output, self._shape)})
            return
        hidden, x = hidden_states(args, kwargs, self._shape), record.share(INPUT)
        if x is not None:
            args, kwargs = replaced(args, kwargs, hidden, x)
        self._compare(module, record, run_alone(module, args, kwargs, hidden, self._shape, self._weigh))

    def _weigh(self, output: torch.Tensor) -> torch.Tensor:
        return self.batch.draw(output, slice(None), self.batch.columns)

    def _record(self, module: torch.nn.Module, calls: dict[torch.nn.Module, int]) -> _Record:
        number = calls[module] = calls.get(module, -1) + 1
        records = self._records.get(module, [])
        if number >= len(records):
            raise RuntimeError(
                f"{self._names[module]} is called {number + 1} times on shards and {len(records)} times on whole "
                f"sequences, so it cannot be compared. {TRAINED_ANYWAY}"
            )
        return records[number]

    def _compare(self, module: torch.nn.Module, record: _Record, found: Mapping[str, torch.Tensor | None]) -> None:
        """Record the differences of this shard's tensors from those on whole sequences."""
        real = self.batch.real[:, self.batch.columns]
        share = MOST if module in self.layers and _is_routed(module) else 1.0
        for name, tensor in found.items():
            expected = record.share(name)
            if tensor is None or expected is None:
                continue
            rounding = _worst(torch.cat(record.rounding[name]), share) if name in record.rounding else 0.0
            largest = max(record.largest[name], torch.finfo(torch.float32).tiny)
            bound = max(MARGIN * rounding / largest, FLOOR * record.epsilon)
            error = _worst(_by_token(tensor, expected, real), share) / largest
            self._differences.append(
                Difference(self._names[module], name, self.batch.kind, error, bound),
            )


def _is_routed(module: torch.nn.Module) -> bool:
    return any(ROUTED.fullmatch(type(part).__name__) for part in module.modules())


def _epsilon(tensor: torch.Tensor) -> float:
    """Return the epsilon of a tensor's dtype, or that of autocast where it is on and coarser."""
    kind, epsilon = tensor.device.type, torch.finfo(tensor.dtype).eps
    if torch.is_autocast_enabled(kind):  # a sum of float32 may hide what bfloat16 has computed
        epsilon = max(epsilon, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    return epsilon


def _by_token(found: torch.Tensor, expected: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Compute the largest difference of each token that is not padding, `[tokens]`."""
    real = real.to(found.device)
    return (found[real].double() - expected[real].double()).flatten(1).abs().amax(1)


def _worst(errors: torch.Tensor, share: float) -> float:
    """Compute the quantile `share` of the errors: the largest for 1.0."""
    if not len(errors):
        return 0.0
    return float(errors.max() if share == 1.0 else errors.nan_to_num(nan=float("inf")).quantile(share))
