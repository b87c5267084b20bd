"""Modules that treat each token alone, run on some tokens at a time: a tile.

Each tile is checkpointed, so that what lies inside of such a module exists for one tile at a time, in forward and in
backward: the intermediate values of an MLP or of experts, and those of a norm, which computes in float32. Autograd
adds the gradients of the tiles, those of weights in float32 or wider.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import GradientCheckpointingLayer, PreTrainedModel

from ..compat import asks_interface, is_expert_parallel, recorded_outputs, tree_flatten, tree_unflatten
from ..distributed.mesh import world
from ..distributed.messages import accumulation_dtype
from .active_batch import ActiveBatch, entered
from .mixers.recognise import mixers
from .patches.module_patch import BatchPatch
from .switches import switches
from .tensor_parallel.sequence_parallel import SequenceParallel

logger = logging.getLogger(__name__)

SEVERAL = 3
"""Number of tiles at least while models are compared, since short batches would fit into one."""


def modules_by_token(decoder: PreTrainedModel) -> list[torch.nn.Module]:
    """List the MLPs, mixtures of experts and norms of a decoder: modules that treat each token alone.

    What runs on a shard as it was written treats each token alone, since shards would not be exact otherwise. So these
    are the modules of layers that neither are nor hold attention or a mixer, and the last norm. Those with one matrix
    are left out: what lies inside of a linear layer is no larger than its output.
    """
    mixing = {part for module in mixers(decoder) for part in module.modules()}
    mixing |= {module for module in decoder.modules() if asks_interface(type(module))}
    layers = [x for x in decoder.modules() if isinstance(x, GradientCheckpointingLayer) and x not in mixing]
    found = [part for layer in layers for part in _by_token(layer, mixing)]
    return list(dict.fromkeys([*found, *(child for child in decoder.children() if is_norm(child))]))


def _by_token(parent: torch.nn.Module, mixing: set[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    """Iterate over the outermost modules inside of another one that have no module of `mixing` in them."""
    for child in parent.children():
        is_list = isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict))
        if child in mixing:
            continue
        if is_list or not mixing.isdisjoint(child.modules()):
            yield from _by_token(child, mixing)
        elif _matrices(child) >= 2 or is_norm(child):
            yield child


def is_norm(module: torch.nn.Module) -> bool:
    """Return whether a module is a norm: all its weights are vectors, and it has no module inside.

    In bfloat16, the norm of Llama needs up to 12 times the memory of its input in backward.
    """
    sizes = [len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in module.parameters()]
    return sizes != [] and max(sizes) == 1 and not list(module.children())


def _matrices(module: torch.nn.Module) -> int:
    """Count the weights of a module that have two dimensions or more. Adapters of a linear layer do not count."""
    if isinstance(module, torch.nn.Linear) or hasattr(module, "base_layer"):
        return 1
    # ZeRO-3 of DeepSpeed keeps the shape of a parameter beside the empty parameter.
    return sum(len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 for parameter in module.parameters())


class Tiles:
    """Part of an active batch: it runs modules on one tile at a time."""

    def __init__(self, batch: ActiveBatch):
        self._batch = batch
        self._most = batch.group.config.tile_tokens
        self._agreed: dict[int, int] = {}
        """Number of tiles that all ranks have agreed on, by the number of tokens."""

    def run(self, module: torch.nn.Module, forward: Callable, turn: int, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` on tiles of its tokens, and join what it returns.

        Raises:
            ValueError: if it returns a tensor that has no entry for each token.
        """
        leaves, form = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        shape = next((tuple(leaves[place].shape[:2]) for place in places if leaves[place].dim() >= 3), None)
        # With sequence parallelism the ranks of a TP group have parts of the tokens in norms, and all of them in MLPs.
        if self._most is None or (self._batch.group.config.sequence_parallel and is_norm(module)):
            return forward(*args, **kwargs)
        if shape is None or any(tuple(leaves[place].shape[:2]) != shape for place in places):
            _warn(type(module))
            return forward(*args, **kwargs)
        count = self._count(module, shape[0] * shape[1])
        if count == 1:
            return forward(*args, **kwargs)

        def of_tile(*given: torch.Tensor) -> Any:
            here = list(leaves)
            for place, tensor in zip(places, given):
                here[place] = tensor[None]
            arguments, keywords = tree_unflatten(here, form)
            with entered(self._batch), self._shared(given[0]):  # backward computes the tile after the batch was left
                return forward(*arguments, **keywords)

        if torch.is_grad_enabled():
            forward = _with_wide_gradients(module, forward)
        whole = [leaves[place] for place in places]
        for place in places:  # `of_tile` lives until backward, and needs the tokens of its tile alone
            leaves[place] = None
        del args, kwargs
        parts, records = [], _Records()
        sizes = _sizes(shape[0] * shape[1], count)
        # Backward of `split_with_sizes` joins the gradients of the tiles at once. That of `tensor_split` makes a whole
        # tensor for each tile, and adds all of them.
        for tile in zip(*(tensor.flatten(0, 1).split_with_sizes(sizes) for tensor in whole)):
            if torch.is_grad_enabled():
                output = checkpoint(of_tile, *tile, use_reentrant=False, preserve_rng_state=module.training)
            else:
                output = of_tile(*tile)
            parts.append(output)
            records.take()
        records.put_back(lambda pieces: _joined(module, pieces, shape))
        return _joined(module, parts, shape)

    def _count(self, module: torch.nn.Module, tokens: int) -> int:
        """Return the number of tiles of a module, which is the same on all ranks that its forward waits for.

        Args:
            tokens: number of tokens that this rank gives the module.
        """
        most = min(self._most, -(-tokens // SEVERAL)) if switches.several_tiles else self._most
        if self._batch.group.config.sequence_parallel:  # a tile is gathered from all ranks of the TP group
            most = max(1, most // self._batch.group.groups.tensor.size)
        count = -(-tokens // most)
        if self._batch.group.groups.data_size > 1 and _waits_inside(module):
            if tokens not in self._agreed:  # other CP groups may hold fewer tokens
                ranks = world()
                agreed = torch.tensor(count, device=ranks.device)
                dist.all_reduce(agreed, dist.ReduceOp.MAX, group=ranks.group)
                self._agreed[tokens] = int(agreed)
            count = self._agreed[tokens]
        return count

    def _shared(self, tile: torch.Tensor) -> AbstractContextManager:
        """Let the ranks of the TP group gather a tile, `[T, D]` on each, in place of all tokens of the shard."""
        if not self._batch.group.config.sequence_parallel:
            return nullcontext()
        return self._batch.part(SequenceParallel).of_tile(len(tile))


class TilePatch(BatchPatch):
    """Runs modules that treat each token alone on one tile at a time, while a batch is active."""

    part = Tiles

    def replace_parts(self, decoder: PreTrainedModel) -> None:
        """Replace the modules of a decoder that `modules_by_token` lists.

        Raises:
            ValueError: if it has none.
        """
        found = modules_by_token(decoder)
        if all(is_norm(module) for module in found):
            raise ValueError(
                f"tile_tokens: {type(decoder).__name__} has no MLP and no mixture of experts that is a module of its "
                "own in a layer and treats each token alone. Leave tile_tokens out."
            )
        for module in found:
            self.replace(module)


class _Records:
    """Outputs of modules inside of tiles that Transformers has recorded, such as the logits of routers."""

    def __init__(self) -> None:
        self._lists = [value for value in recorded_outputs().values() if isinstance(value, list)]
        self._lengths = [len(value) for value in self._lists]
        self._taken: list[list[tuple]] = [[] for _ in self._lists]

    def take(self) -> None:
        """Take what was recorded for one tile."""
        for values, length, taken in zip(self._lists, self._lengths, self._taken):
            taken.append(tuple(values[length:]))
            del values[length:]

    def put_back(self, join: Callable) -> None:
        """Put back what was recorded, with the tiles joined."""
        for values, taken in zip(self._lists, self._taken):
            values.extend(join(taken))


def _joined(module: torch.nn.Module, parts: Sequence[Any], shape: tuple[int, int]) -> Any:
    """Join what a module has returned for each tile.

    Args:
        shape: rows and tokens that the module was given.

    Raises:
        ValueError: if a tensor has no entry for each token.
    """
    leaves, forms = zip(*map(tree_flatten, parts))
    return tree_unflatten([_joined_leaf(module, pieces, shape) for pieces in zip(*leaves)], forms[0])


def _sizes(tokens: int, count: int) -> list[int]:
    """Tokens of each tile. They differ by one at most."""
    least, more = divmod(tokens, count)
    return [least + (number < more) for number in range(count)]


def _joined_leaf(module: torch.nn.Module, pieces: Sequence[Any], shape: tuple[int, int]) -> Any:
    """Join tensors `[1, T, ...]` of tiles to `[B, S, ...]`, or tensors `[T, ...]` to `[B * S, ...]`."""
    if not isinstance(pieces[0], torch.Tensor):
        return pieces[0]
    tiles = _sizes(shape[0] * shape[1], len(pieces))
    if [tuple(piece.shape[:2]) for piece in pieces] == [(1, tile) for tile in tiles]:
        return torch.cat(list(pieces), dim=1).squeeze(0).unflatten(0, shape)
    if [piece.shape[:1] for piece in pieces] == [(tile,) for tile in tiles]:
        return torch.cat(list(pieces))
    raise ValueError(
        f"tile_tokens: {type(module).__name__} returns a tensor of shape {tuple(pieces[0].shape)} for a tile, which "
        "has no entry for each token. Leave tile_tokens out."
    )


class _Run(torch.nn.Module):
    """Module with another one inside, whose forward is a function of that one's weights."""

    def __init__(self, module: torch.nn.Module, forward: Callable):
        super().__init__()
        self.module, self._run = module, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def _with_wide_gradients(module: torch.nn.Module, forward: Callable) -> Callable:
    """Wrap the forward of a module, so that the gradients of its weights over several calls are summed in float32.

    Autograd sums in the dtype of a tensor that is used several times. In bfloat16 the rounding of the sum would grow
    with the number of tiles. So each call casts weights from one copy in float32.
    """
    trained = ((f"module.{name}", x) for name, x in module.named_parameters() if x.requires_grad)
    dtypes = {name: x.dtype for name, x in trained if x.dtype != accumulation_dtype(x.dtype)}
    if not dtypes or _waits_inside(module):  # which holds no whole weights
        return forward
    run = _Run(module, forward)
    wide = {name: run.get_parameter(name).to(accumulation_dtype(dtype)) for name, dtype in dtypes.items()}

    def of_wide(*args: Any, **kwargs: Any) -> Any:
        weights = {name: x.to(dtypes[name]) for name, x in wide.items()}
        return functional_call(run, weights, args, kwargs)

    return of_wide


def _waits_inside(module: torch.nn.Module) -> bool:
    """Return whether the forward of a module waits for ranks that may hold other batches.

    They hold parts of its parameters (FSDP inside of it, ZeRO-3), or some of its experts.
    """
    return any(
        (isinstance(part, FSDPModule) and part is not module)
        or is_expert_parallel(part)
        or any(hasattr(parameter, "ds_shape") for parameter in part.parameters(recurse=False))
        for part in module.modules()
    )


@cache
def _warn(kind: type[torch.nn.Module]) -> None:
    """Say once of a class of modules that it does not run on tiles."""
    logger.warning(
        f"tile_tokens: {kind.__name__} is given tensors that do not begin with rows and tokens, so it runs on all "
        "tokens of a shard at once."
    )
