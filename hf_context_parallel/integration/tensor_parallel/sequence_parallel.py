"""Sequence parallelism: between tensor-parallel regions, each rank of a TP group holds a part of the shard's tokens.

A region is a module of a decoder layer that holds column-wise and row-wise layers: attention or MLP. The input of a
region is gathered, and the output of its row-wise layer is reduce-scattered. Norms and residuals in between are
computed on the part. Without an active batch, the model runs as Transformers sharded it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear, pad
from transformers import GradientCheckpointingLayer, PreTrainedModel

from ...distributed.mesh import Ranks
from ..active_batch import ActiveBatch
from ..model_registry import decoder_of
from ..patches.module_patch import BatchPatch
from .plan_styles import styles_of
from .replicated import SUMMED, SumGradients, summed_gradients

FIRST, LAST, REGION, COLUMN, ROW, NORM = "first layer", "last norm", "region", "column-wise", "row-wise", "norm"
INSIDE = {"colwise", "rowwise", SUMMED}
"""Styles that modules of a region may have in the plan."""
NAMED_NORM = re.compile(r"\w*(LayerNorm|RMSNorm)\w*")
"""Class names of norms: modules that compute token by token with weights that all ranks hold."""


class Shares:
    """Division of the tokens of a shard among the ranks of a TP group: equal parts, padded at the end.

    Args:
        ranks: the TP group.
        length: number of tokens in a row of the shard.
    """

    def __init__(self, ranks: Ranks, length: int):
        self._ranks, self.length = ranks, length
        self.part = -(-length // ranks.size)

    @property
    def mine(self) -> slice:
        """Range of the tokens of this rank. The last ranks may have fewer than `part`, or none."""
        begin = min(self._ranks.rank * self.part, self.length)
        return slice(begin, min(begin + self.part, self.length))

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """Return the part of this rank, `[B, part, D]`, of `[B, length, D]`."""
        return self._parts(x)[self._ranks.rank]

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the parts of all ranks to `[B, length, D]`."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self._ranks.size)]
        dist.all_gather(parts, x, group=self._ranks.group)
        return torch.cat(parts, dim=1)[:, : self.length]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `[B, length, D]` over the ranks, and return the part of this rank: a reduce-scatter."""
        parts = self._parts(x)
        result = torch.empty_like(parts[0])
        dist.reduce_scatter(result, parts, group=self._ranks.group)
        return result

    def _parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        padded = pad(x, (0, 0, 0, self.part * self._ranks.size - self.length))
        return [part.contiguous() for part in padded.split(self.part, dim=1)]


class _Move(torch.autograd.Function):
    """Apply one method of `Shares` in forward, and another in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Callable, back: Callable) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back(grad), None, None


class SequenceParallel:
    """Part of an active batch: it runs the layers of a model on parts of the tokens."""

    def __init__(self, batch: ActiveBatch):
        self._ranks = batch.group.groups.tensor
        self._shares = Shares(self._ranks, batch.shard.layout.local_length(batch.shard.rank))
        self._runs = {
            FIRST: self._first,
            REGION: self._region,
            COLUMN: self._column,
            ROW: self._row,
            NORM: self._norm,
            LAST: self._last,
        }

    def run(self, module: torch.nn.Module, forward: Callable, part: str, *args: Any, **kwargs: Any) -> Any:
        """Run a module that takes part in sequence parallelism as `part`, such as `REGION`."""
        return self._runs[part](module, forward, args, kwargs)

    @contextmanager
    def of_tile(self, tokens: int) -> Iterator[None]:
        """Run regions on a tile in this block: on `tokens` tokens of each rank, in place of all of its part."""
        before = self._shares
        self._shares = Shares(self._ranks, tokens * self._ranks.size)
        try:
            yield
        finally:
            self._shares = before

    def _first(self, module, forward, args, kwargs):
        """Run the first layer. It is given all tokens, and gets the part of this rank."""
        return _with_hidden(forward, args, kwargs, self._shares.cut, self._shares.join)

    def _region(self, module, forward, args, kwargs):
        """Run a region on all tokens. Each rank computes the gradient of its heads and columns, so they are summed."""
        return _with_hidden(forward, args, kwargs, self._shares.join, self._shares.sum)

    def _column(self, module, forward, args, kwargs):
        return linear(args[0], _local(module.weight), _local(module.bias))

    def _row(self, module, forward, args, kwargs):
        summed = _Move.apply(linear(args[0], _local(module.weight)), self._shares.sum, self._shares.join)
        if module.bias is None:
            return summed
        return summed + SumGradients.apply(_local(module.bias), self._ranks.group)

    def _norm(self, module, forward, args, kwargs):
        with summed_gradients(module, self._ranks.group):
            return forward(*args, **kwargs)

    def _last(self, module, forward, args, kwargs):
        """Run the norm after the layers, and gather its output. All ranks then compute the same, with one gradient."""
        return _Move.apply(self._norm(module, forward, args, kwargs), self._shares.join, self._shares.cut)


class SequenceParallelPatch(BatchPatch):
    """Runs the layers of a model on parts of the tokens while a batch is active."""

    part = SequenceParallel

    def replace_parts(self, model: PreTrainedModel) -> None:
        """Replace every module of the model that takes part in sequence parallelism.

        Raises:
            ValueError: if the model does not have the form that `parts` requires.
        """
        for module, part in parts(model):
            self.replace(module, part)


def _with_hidden(forward: Callable, args: tuple, kwargs: dict[str, Any], there: Callable, back: Callable) -> Any:
    """Call `forward` with moved hidden states: the argument `hidden_states`, or the first one."""
    if "hidden_states" in kwargs:
        return forward(*args, **{**kwargs, "hidden_states": _Move.apply(kwargs["hidden_states"], there, back)})
    return forward(_Move.apply(args[0], there, back), *args[1:], **kwargs)


def _local(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def parts(model: PreTrainedModel) -> list[tuple[torch.nn.Module, str]]:
    """List the modules that take part in sequence parallelism, each with its part, such as `REGION`.

    Raises:
        ValueError: naming the module of the model, or the entry of its plan, that does not fit.
    """
    styles = styles_of(model)
    decoder = decoder_of(model)
    layers, norms = [], []
    for name, child in decoder.named_children():
        if isinstance(child, torch.nn.ModuleList) and all(isinstance(x, GradientCheckpointingLayer) for x in child):
            layers += child
        elif _is_norm(child):
            norms.append(child)
        elif _has_parameters(child) and not isinstance(child, torch.nn.Embedding):
            raise _refusal(model, f"{name} ({_name(child)}) beside its layers")
    if not layers or len(norms) != 1:
        raise _refusal(model, f"{len(layers)} layers and {len(norms)} norms in {type(decoder).__name__}")
    found = [(layers[0], FIRST), (norms[0], LAST)]
    for layer in layers:
        found += _parts_of_layer(model, layer, styles)
    return found


def _parts_of_layer(
    model: PreTrainedModel, layer: torch.nn.Module, styles: Mapping[torch.nn.Module, str]
) -> Iterator[tuple[torch.nn.Module, str]]:
    kind = _name(layer)
    if list(layer.parameters(recurse=False)):
        raise _refusal(model, f"parameters of {kind} itself")
    for name, child in layer.named_children():
        if any(module in styles for module in child.modules()):
            yield from _parts_of_region(model, f"{kind}.{name}", child, styles)
        elif _is_norm(child):
            yield child, NORM
        elif _has_parameters(child):
            raise _refusal(model, f"{kind}.{name} ({_name(child)}), which its plan does not shard")


def _parts_of_region(
    model: PreTrainedModel, name: str, region: torch.nn.Module, styles: Mapping[torch.nn.Module, str]
) -> Iterator[tuple[torch.nn.Module, str]]:
    yield region, REGION
    for path, module in region.named_modules():
        style = styles.get(module)
        where = f"{name}.{path} ({_name(module)})"
        if style is None and not list(module.parameters(recurse=False)):
            continue
        if style not in INSIDE:
            raise _refusal(model, f"{where}, which its plan {f'has as {style!r}' if style else 'does not shard'}")
        if style != SUMMED:
            if type(module) is not torch.nn.Linear:
                raise _refusal(model, f"{where}, which is no torch.nn.Linear")
            yield module, COLUMN if style == "colwise" else ROW


def _is_norm(module: torch.nn.Module) -> bool:
    return NAMED_NORM.fullmatch(type(module).__name__) is not None and not list(module.children())


def _has_parameters(module: torch.nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _name(module: torch.nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")  # fully_shard puts this prefix before the name


def _refusal(model: PreTrainedModel, what: str) -> ValueError:
    return ValueError(
        f"sequence_parallel=True: {_name(model)} has {what}, and only decoders of an embedding, layers and a norm, "
        "whose layers hold norms and regions of 'colwise' and 'rowwise' layers, are exact. Leave sequence_parallel "
        "off: tensor parallelism alone does not need this form."
    )
