"""Native mixers: the forward of the module runs on the shard, and each rank computes its share.

Such a forward mixes tokens only by functions that it looks up by name (see `token_functions`). These functions are
replaced while it runs. A convolution gets the tokens before the shard from their owners (see `halo`). A scan runs
along whole sequences, on each rank for some of the heads (see `scan_heads`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch

from ...data.batch import take_columns
from ...distributed.host import to_device
from ...distributed.token_exchange import deal_heads
from ..active_batch import ActiveBatch
from ..patches.module_patch import BatchPatch, by_name
from .halo import Halo
from .scan_heads import Heads
from .token_functions import CONVOLUTION, CONVOLUTION_ARGUMENTS, FUSED, SCANS, token_functions
from .whole_sequences import PADDING_MASKS, WholeSequences

NOT_OF_MIXERS = frozenset(
    {
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "shift_labels",
    }
)
"""Arguments that models pass to all of their layers, and that mixers do not use."""


class NativeMixers:
    """Part of an active batch: it runs mixers on shards."""

    def __init__(self, batch: ActiveBatch):
        self._batch = batch
        self._heads: Heads | None = None
        self._halos: dict[tuple[int, torch.device], Halo] = {}
        self._paddings: dict[torch.device, torch.Tensor | None] = {}

    def run(self, module: torch.nn.Module, forward: Callable, turn: int, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` on the tokens of this rank. Its convolutions and scans see the tokens of the other ranks.

        Raises:
            RuntimeError: if it does not call the functions that were found in its code.
        """
        arguments, parameters = by_name(forward, args, kwargs), inspect.signature(forward).parameters.keys()
        unused = NOT_OF_MIXERS - parameters
        if not all(_is_nothing(value) for name, value in arguments.items() if name not in {"hidden_states"} | unused):
            # The ranks cannot share such a call.
            return self._batch.part(WholeSequences).run(module, forward, turn, *args, **kwargs)
        called = token_functions(module)
        self._batch.note(type(module).__name__, "halo" if called <= {CONVOLUTION} else "heads")
        arguments = {name: value for name, value in arguments.items() if name not in unused}
        arguments |= dict.fromkeys(parameters & set(PADDING_MASKS), self._padding(arguments["hidden_states"].device))
        with self._replacing(inspect.unwrap(type(module).forward).__globals__, called, turn) as reached:
            output = forward(**arguments)
        if missed := called - reached:
            raise RuntimeError(
                f"the forward of {type(module).__name__} did not call {', '.join(sorted(missed))}, so that it saw no "
                "tokens of other ranks. If another library replaces this forward, switch that off."
            )
        return output

    @contextmanager
    def _replacing(self, names: dict[str, Any], called: set[str], turn: int) -> Iterator[set[str]]:
        """Replace the functions under these names inside the block, and yield the set of those that were called.

        Modules look up the names in each call. Recomputation calls the module again, and so finds them too.
        """
        originals = {name: names[name] for name in called}
        reached = {FUSED}  # a mixer calls it in training only

        def replaced(name: str) -> Callable:
            def function(*args: Any, **kwargs: Any):
                reached.add(name)
                if name == FUSED:
                    return None  # as if its kernel were not installed
                if name == CONVOLUTION:
                    return self._convolve(originals[name], args, kwargs)
                return self._scan(originals[name], name, turn, args, kwargs)

            return function

        names.update({name: replaced(name) for name in called})
        try:
            yield reached
        finally:
            names.update(originals)

    def _padding(self, device: torch.device) -> torch.Tensor | None:
        """Return the padding mask of the shard, `[B, S_local]`, 0 at padding. None if the batch has no padding."""
        if device not in self._paddings:
            shard = self._batch.shard
            padding = shard.padding
            if padding is not None:
                positions = shard.layout.positions(shard.rank)
                padding = to_device(take_columns(padding, positions, shard.layout.length, 0), device)
            self._paddings[device] = padding
        return self._paddings[device]

    def _convolve(self, original: Callable, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """Call the convolution `original` of `[B, C, S_local]` with the halo of the shard.

        Raises:
            ValueError: if it is given an unknown argument.
        """
        given = _named(CONVOLUTION, CONVOLUTION_ARGUMENTS, args, kwargs)
        _refuse_unknown(CONVOLUTION, given, CONVOLUTION_ARGUMENTS)
        x, width = given["hidden_states"], given["weight"].shape[-1] - 1
        halo = self._halo(width, x.device)
        extended = halo.extended(x.transpose(1, 2)).transpose(1, 2)
        args, kwargs = _with({"hidden_states": extended}, CONVOLUTION_ARGUMENTS, args, kwargs)
        return halo.trimmed(original(*args, **kwargs).transpose(1, 2)).transpose(1, 2)

    def _scan(self, original: Callable, name: str, turn: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call the scan `original` along whole sequences, for the heads of this rank.

        Raises:
            ValueError: if it is given an unknown argument, such as an initial state.
        """
        scan = SCANS[name]
        given = _named(name, scan.positional, args, kwargs)
        tensors = (*scan.by_head, *scan.by_group, *scan.per_head)
        _refuse_unknown(name, given, (*tensors, *scan.options))
        by_token = {key: given[key] for key in (*scan.by_head, *scan.by_group)}
        count = by_token[scan.by_head[0]].shape[2]
        shares = deal_heads(count, self._batch.group.size, turn)
        self._heads = geometry = self._heads or Heads(self._batch.shard, self._batch.group.exchange)
        whole = dict(zip(by_token, geometry.whole(list(by_token.values()), shares)))
        mine = shares[self._batch.group.rank]
        per_head = {key: given[key] for key in scan.per_head if given.get(key) is not None}

        def computed(tensors: Mapping[str, torch.Tensor], heads: range) -> Any:
            own = {key: parameter[heads.start : heads.stop] for key, parameter in per_head.items()}
            here, there = _with({**tensors, **own}, scan.positional, args, kwargs)
            return original(*here, **there)

        outputs, begin, returned = [], 0, None
        for length, group in groupby(geometry.sequences, key=lambda sequence: sequence.length) if mine else ():
            rows = len(list(group))
            end = begin + rows * length
            returned = computed({key: x[begin:end].unflatten(0, (rows, length)) for key, x in whole.items()}, mine)
            outputs.append(_first(returned).flatten(0, 1))
            begin = end
        if not mine:
            # A rank without heads runs one head of a few of its own tokens, and drops the result. So it learns the
            # dtype and shape of the output, all parameters have gradients on all ranks, and backward enters the same
            # exchanges.
            few = {key: x[:1, :3, :1] for key, x in by_token.items()}
            returned = computed(few, range(1))
            outputs.append(_of_no_heads(_first(returned), list(whole.values())))
        output = geometry.sharded(torch.cat(outputs), shares)
        return (output, *returned[1:]) if isinstance(returned, tuple) else output

    def _halo(self, width: int, device: torch.device) -> Halo:
        if (width, device) not in self._halos:
            self._halos[width, device] = Halo(self._batch.shard, width, self._batch.group.groups.group, device)
        return self._halos[width, device]


class NativePatch(BatchPatch):
    """Runs mixers natively while a batch is active."""

    part = NativeMixers


def _is_nothing(value: Any) -> bool:
    return value is None or value is False


def _named(function: str, positional: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name.

    The names are those that Transformers uses. A kernel in the place of its function may have another signature.
    """
    if len(args) > len(positional):
        raise ValueError(
            f"{function} was given {len(args)} arguments by position, and {len(positional)} are known. Run the model "
            "in `with cp.whole(model):`."
        )
    return {**dict(zip(positional, args)), **kwargs}


def _refuse_unknown(function: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(name for name, value in given.items() if name not in known and not _is_nothing(value))
    if unknown:
        raise ValueError(
            f"{function} was given {', '.join(unknown)}, which this package cannot share among ranks. Run the model "
            "in `with cp.whole(model):`."
        )


def _with(
    changes: Mapping[str, Any], positional: tuple[str, ...], args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Change some arguments of a call. Each is still passed as it was, by position or by name."""
    by_position = positional[: len(args)]
    args = tuple(changes.get(name, value) for name, value in zip(by_position, args))
    return args, kwargs | {name: value for name, value in changes.items() if name not in by_position}


def _first(returned: Any) -> torch.Tensor:
    return returned[0] if isinstance(returned, tuple) else returned


def _of_no_heads(output: torch.Tensor, whole: list[torch.Tensor]) -> torch.Tensor:
    """Return an empty `[T, 0, ...]` that depends on `output`, `[B, S, H, ...]`, and on `whole`, `[T, 0, ...]`.

    Backward passes through both with zero gradients.
    """
    nothing = output[:0].sum() + sum(x.sum() for x in whole)
    return output.new_zeros(whole[0].shape[0], 0, *output.shape[3:]) + nothing.to(output.dtype)
