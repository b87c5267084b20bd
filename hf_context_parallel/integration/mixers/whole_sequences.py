"""Modules that see whole sequences: their forward is replaced, and runs on whole sequences while a batch is active.

Arguments that hold a value for each token are resharded (see `resharding`), and so are the outputs. The attention mask
is that of the whole sequences. A forward hook would not do, since a rank calls the module once for each length of
sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...compat import tree_flatten, tree_unflatten
from ...distributed.host import beside
from ..active_batch import ActiveBatch, entered
from ..interfaces.planned_mask import PlannedMask
from ..interfaces.stock_attention import stock_attention, whole_mask
from ..patches.module_patch import BatchPatch, by_name
from ..patches.positions import MADE_BY_MODEL
from .recognise import makes_positions
from .resharding import Resharding, Sequence

PADDING_MASKS = {"attention_mask", "conv_mask", "conv"}
"""Names of arguments that hold a padding mask. Modules get None for them on a shard."""

ROUTERS = "router_logits"
"""Output of a model that holds the logits of its routers, `[B * S, experts]` for each layer."""


class _Call(NamedTuple):
    """One call of a module, with sequences of one length.

    A call without sequences takes a few tokens of this rank, and its result is dropped. It is made on a rank that has
    no sequence, and in a whole model under FSDP on a rank that has fewer lengths than another. So all parameters have
    gradients on all ranks, and all ranks enter the same collectives.

    Args:
        sequences: the rows of the call.
        tokens: their range among the tokens of all sequences of this rank.
        shape: number of rows, and tokens of each.
    """

    sequences: list[Sequence]
    tokens: slice
    shape: tuple[int, int]


class WholeSequences:
    """Part of an active batch: it runs modules on whole sequences."""

    def __init__(self, batch: ActiveBatch):
        self._batch = batch
        self._reshardings: dict[tuple[int, torch.device], Resharding] = {}

    def run(self, module: torch.nn.Module, forward: Callable, turn: int, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` on whole sequences, and return its outputs as shards."""
        turn %= self._batch.group.size
        self._batch.note(type(module).__name__, "whole sequences")
        parameters = inspect.signature(forward).parameters
        arguments = by_name(forward, args, kwargs)
        positions = arguments.get("position_ids")
        if isinstance(positions, torch.Tensor) and positions.dim() == 3:  # several axes come first
            arguments["position_ids"] = positions.permute(1, 2, 0)
        leaves, form = tree_flatten(arguments)
        local = [index for index, leaf in enumerate(leaves) if self._is_by_token(leaf)]
        resharding = self._resharding(turn, leaves[local[0]].device)
        by_token = (leaves[index] for index in local)
        expanded = [leaf.expand(self._batch.shard.local_shape[0], *leaf.shape[1:]) for leaf in by_token]
        whole = _together(resharding.whole, expanded, leading=2)

        results, output_form = [], None
        least = _least_calls(module, len({sequence.length for sequence in resharding.mine}))
        for call in _calls(resharding.mine, least, self._batch.shard.local_shape[1]):
            if call.sequences:
                given = [tensor[call.tokens].unflatten(0, call.shape) for tensor in whole]
            else:
                given = [leaves[index][:1, : call.shape[1]] for index in local]
            arguments = self._arguments(module, parameters, leaves, dict(zip(local, given)), form, call)
            with entered(None), stock_attention(module):
                output = forward(**arguments)
            if isinstance(output, ModelOutput):
                output = _of_whole_model(output, call)
            outputs, output_form = tree_flatten(output)
            outputs = [_rows(leaf, call) for leaf in outputs]
            if not call.sequences:
                outputs = [_tied(leaf, whole) for leaf in outputs]
            results.append(outputs)
        by_call = list(zip(*results))
        computed = [index for index, parts in enumerate(by_call) if _is_computed(parts[0])]
        output = [parts[0] for parts in by_call]
        joined = [torch.cat(by_call[index]) for index in computed]
        for index, tensor in zip(computed, _together(resharding.sharded, joined, leading=1)):
            output[index] = tensor
        made = tree_unflatten(output, output_form)
        if isinstance(made, ModelOutput) and made.get(ROUTERS):
            made[ROUTERS] = tuple(logits.flatten(0, 1) for logits in made[ROUTERS])
        return made

    def _arguments(self, module, parameters, leaves: list, given: dict[int, torch.Tensor], form, call: _Call) -> dict:
        """Build the arguments of the module for the sequences of `call`.

        Args:
            parameters: parameters of its forward, by name.
            leaves, form: arguments that the module was given on the shard, flattened.
            given: resharded tensors, by the index of the leaf that they replace.
        """
        padding = self._padding(call)
        like = next((tensor for tensor in given.values() if tensor.is_floating_point()), None)
        here = [
            given.get(index, whole_mask(leaf, *call.shape, padding, like) if isinstance(leaf, PlannedMask) else leaf)
            for index, leaf in enumerate(leaves)
        ]
        arguments = tree_unflatten(here, form)
        positions = arguments.get("position_ids")
        if positions is not None and positions.dim() == 3:
            arguments["position_ids"] = positions.permute(2, 0, 1)
        elif makes_positions(module) and not self._batch.shard.positioned:  # it counts them itself on whole sequences
            arguments |= dict.fromkeys(arguments.keys() & {"position_ids"})
        elif not call.sequences and positions is not None:  # some modules read the largest position
            arguments["position_ids"] = torch.arange(call.shape[1], device=positions.device)[None]
        for name, value in arguments.items():
            made = MADE_BY_MODEL.get((type(module).__name__, name))
            if made is not None:
                seen = torch.ones(call.shape, dtype=torch.long) if padding is None else padding
                arguments[name] = made(module, value, seen)
        for name in PADDING_MASKS & (parameters.keys() | arguments.keys()):
            arguments[name] = _with_padding(arguments.get(name), padding)
        return arguments

    def _is_by_token(self, leaf: Any) -> bool:
        rows, tokens = self._batch.shard.local_shape
        return (
            isinstance(leaf, torch.Tensor)
            and leaf.dim() >= 2
            and leaf.shape[0] in (1, rows)
            and leaf.shape[1] == tokens
        )

    def _resharding(self, turn: int, device: torch.device) -> Resharding:
        if (turn, device) not in self._reshardings:
            group = self._batch.group.groups.group
            self._reshardings[turn, device] = Resharding(self._batch.shard, turn, group, device)
        return self._reshardings[turn, device]

    def _padding(self, call: _Call) -> torch.Tensor | None:
        """Return the padding mask of the rows of a call, `[rows, length]`. None if the batch has no padding."""
        padding = self._batch.shard.padding
        if padding is None:
            return None
        rows = [sequence.row for sequence in call.sequences]
        return padding[rows] if rows else torch.ones(call.shape, dtype=torch.long)


class WholePatch(BatchPatch):
    """Lets modules see whole sequences while a batch is active."""

    part = WholeSequences


def _least_calls(module: torch.nn.Module, wanted: int) -> int:
    """Agree on a number of calls that all ranks make: within a call of a whole model, FSDP gathers parameters.

    Args:
        wanted: the number of calls that this rank makes for its sequences.

    Returns:
        The largest number of all ranks that hold parts of the parameters, other CP groups included; 1 if no other
        rank does.
    """
    sharded = (x for x in module.parameters() if isinstance(x, DTensor)) if isinstance(module, PreTrainedModel) else ()
    meshes = dict.fromkeys(parameter.device_mesh for parameter in sharded)
    least = max(1, wanted)
    for mesh in meshes:
        most = torch.tensor(least, device=mesh.device_type)
        for dimension in range(mesh.ndim):
            dist.all_reduce(most, dist.ReduceOp.MAX, mesh.get_group(dimension))
        least = int(most)
    return least if meshes else 1


def _calls(mine: list[Sequence], least: int, local_length: int) -> list[_Call]:
    """List a call for the sequences of each length, and calls without sequences until there are `least`."""
    calls: list[_Call] = []
    begin = 0
    for _, group in groupby(mine, key=lambda sequence: sequence.length):
        alike = list(group)
        end = begin + sum(sequence.length for sequence in alike)
        calls.append(_Call(alike, slice(begin, end), (len(alike), alike[0].length)))
        begin = end
    return calls + [_Call([], slice(0), (1, min(3, local_length)))] * (least - len(calls))


def _of_whole_model(output: ModelOutput, call: _Call) -> ModelOutput:
    """Keep the hidden states of a whole model, and the logits of its routers as `[rows, length, experts]`.

    Its other tensors may look as if they had a value for each token.
    """
    kept = {"last_hidden_state": output.last_hidden_state}
    if output.get(ROUTERS):
        kept[ROUTERS] = tuple(logits.view(*call.shape, -1) for logits in output[ROUTERS])
    return type(output)(**kept)


def _rows(leaf: Any, call: _Call) -> Any:
    """Flatten an output `[B, S, D]` of a module to `[T, D]`, and replace other tensors by None.

    A tensor with other dimensions, such as attention weights or a pooled row, may match the shape by chance.
    """
    if not _is_computed(leaf):
        return leaf
    rows, length = call.shape
    if leaf.dim() != 3 or leaf.shape[:2] not in ((rows, length), (1, length)):
        return None  # code that needs the tensor fails on None
    by_token = leaf.expand(rows, -1, -1).flatten(0, 1)  # position embeddings may have one row for all
    return by_token if call.sequences else by_token[:0]


def _with_padding(mask: Any, padding: torch.Tensor | None) -> Any:
    """Replace a 2-D mask, or None, by the padding mask of the whole sequences. `mask` may be a dictionary of masks."""
    if isinstance(mask, dict):
        return {name: _with_padding(x, padding) if name in PADDING_MASKS else x for name, x in mask.items()}
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return torch.ones_like(mask) if padding is None else beside(padding, mask).to(mask)
    return padding if mask is None else mask


def _is_computed(leaf: Any) -> bool:
    """Return whether an output is a tensor, but not a parameter of the module."""
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, torch.nn.Parameter)


def _tied(leaf: Any, whole: list[torch.Tensor]) -> Any:
    """Make the empty `leaf` depend on the empty tensors `whole`, so that backward reaches them on every rank."""
    if not _is_computed(leaf) or not leaf.requires_grad:
        return leaf
    return leaf + sum(tensor.sum() for tensor in whole if tensor.requires_grad)


def _together(
    move: Callable[[torch.Tensor], torch.Tensor], tensors: list[torch.Tensor], leading: int
) -> list[torch.Tensor]:
    """Apply `move` to all tensors, in one exchange for each dtype and need of gradients.

    With more exchanges than that, their order in backward could differ between ranks.

    Args:
        leading: number of leading dimensions that count tokens.
    """
    moved: list[torch.Tensor] = [None] * len(tensors)
    kinds: dict[tuple, list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.requires_grad), []).append(index)
    for indices in kinds.values():
        flat = [tensors[index].unsqueeze(-1).flatten(leading) for index in indices]
        parts = move(torch.cat(flat, dim=-1)).split([x.shape[-1] for x in flat], dim=-1)
        for index, part in zip(indices, parts):
            moved[index] = part.unflatten(-1, (*tensors[index].shape[leading:], 1)).squeeze(-1)
    return moved
