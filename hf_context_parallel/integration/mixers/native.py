"""Mixers of which each rank computes its share: their forward runs on the shard as it is.

What mixes tokens in there are functions that it finds by name (see `token_functions`), and these are replaced while it
runs: a convolution reads the tokens before the shard's from their owners (see `halo`), and a scan runs along whole
sequences, each rank with some of the heads (see `scan_heads`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch

from ...data.batch import take_columns
from ...distributed.token_exchange import deal_heads
from ..active_batch import ActiveBatch, active_batch
from ..patches.module_patch import ModulePatch, by_name
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
"""What models hand to all of their layers, and mixers have no use for."""


class NativeMixers(ModulePatch):
    """Runs mixers on shards while a batch is open.

    Args:
        whole: computes the calls of which it is not known how to share them.
    """

    def __init__(self, batch: ActiveBatch, whole: WholeSequences):
        super().__init__()
        self._batch, self._whole = batch, whole
        self._heads: Heads | None = None
        self._halos: dict[tuple[int, torch.device], Halo] = {}
        self._paddings: dict[torch.device, torch.Tensor | None] = {}

    @torch.compiler.disable
    def run(self, module: torch.nn.Module, forward: Callable, turn: int, *args, **kwargs) -> Any:
        """What `forward` returns of this rank's tokens, with those of the other ranks seen where it looks for them.

        Raises:
            RuntimeError: if it does not call the functions that it was to call.
        """
        if active_batch() is not self._batch:
            return forward(*args, **kwargs)
        arguments, parameters = by_name(forward, args, kwargs), inspect.signature(forward).parameters.keys()
        unused = NOT_OF_MIXERS - parameters
        if not all(_is_nothing(value) for name, value in arguments.items() if name not in {"hidden_states"} | unused):
            return self._whole.run(module, forward, turn, *args, **kwargs)
        called = token_functions(module)
        self._batch.note(module, "halo" if called <= {CONVOLUTION} else "heads")
        arguments = {name: value for name, value in arguments.items() if name not in unused}
        arguments |= dict.fromkeys(parameters & set(PADDING_MASKS), self._padding(arguments["hidden_states"].device))
        with self._replacing(inspect.unwrap(type(module).forward).__globals__, called, turn) as reached:
            output = forward(**arguments)
        if missed := called - reached:
            raise RuntimeError(
                f"{type(module).__name__} was to call {', '.join(sorted(missed))} and did not, as if its forward had "
                "been replaced by another library: tokens of other ranks were not seen. Leave its forward alone."
            )
        return output

    @contextmanager
    def _replacing(self, names: dict[str, Any], called: set[str], turn: int) -> Iterator[set[str]]:
        """Other functions under these names meanwhile; yields those that were called.

        Modules look them up anew in each call, so that recomputation, which calls a module again, needs no more.
        """
        originals = {name: names[name] for name in called}
        reached = {FUSED}  # it is called in training alone

        def replaced(name: str) -> Callable:
            def function(*args, **kwargs):
                reached.add(name)
                if name == FUSED:
                    return None  # there is no kernel for it
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
        """`[B, S_local]`, 0 at padding; None if the batch has none."""
        if device not in self._paddings:
            shard = self._batch.shard
            padding = shard.padding
            if padding is not None:
                positions = shard.layout.positions(shard.rank)
                padding = take_columns(padding, positions, shard.layout.length, 0).to(device)
            self._paddings[device] = padding
        return self._paddings[device]

    def _convolve(self, original: Callable, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """`original`, which convolves `[B, C, S_local]`, with what comes before the shard's tokens.

        Raises:
            ValueError: if it is given what it is not known how to share.
        """
        given = _named(CONVOLUTION, CONVOLUTION_ARGUMENTS, args, kwargs)
        _refuse_unknown(CONVOLUTION, given, CONVOLUTION_ARGUMENTS)
        x, width = given["hidden_states"], given["weight"].shape[-1] - 1
        halo = self._halo(width, x.device)
        extended = halo.extended(x.transpose(1, 2)).transpose(1, 2)
        args, kwargs = _with({"hidden_states": extended}, CONVOLUTION_ARGUMENTS, args, kwargs)
        return halo.trimmed(original(*args, **kwargs).transpose(1, 2)).transpose(1, 2)

    def _scan(self, original: Callable, name: str, turn: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """`original` along whole sequences, of this rank's heads.

        Raises:
            ValueError: if it is given what it is not known how to share, such as a state to begin with.
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
            # A few of its own tokens and a head, of which nothing is kept: so the rank knows what the others send, all
            # parameters have gradients on all ranks, and backward enters the same exchanges.
            few = {key: x[:1, :3, :1] for key, x in by_token.items()}
            returned = computed(few, range(1))
            outputs.append(_of_no_heads(_first(returned), list(whole.values())))
        output = geometry.sharded(torch.cat(outputs), shares)
        return (output, *returned[1:]) if isinstance(returned, tuple) else output

    def _halo(self, width: int, device: torch.device) -> Halo:
        if (width, device) not in self._halos:
            self._halos[width, device] = Halo(self._batch.shard, width, self._batch.group.groups.group, device)
        return self._halos[width, device]


def _is_nothing(value: Any) -> bool:
    return value is None or value is False


def _named(function: str, positional: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name.

    Not by the function's signature: the names are those of Transformers, and a kernel in its place may have others.
    """
    if len(args) > len(positional):
        raise ValueError(f"{function} was given {len(args)} arguments by position, and {len(positional)} are known.")
    return {**dict(zip(positional, args)), **kwargs}


def _refuse_unknown(function: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(name for name, value in given.items() if name not in known and not _is_nothing(value))
    if unknown:
        raise ValueError(
            f"{function} was given {', '.join(unknown)}, and it is not known how that is shared by the ranks. Call "
            "the model outside cp.shard."
        )


def _with(
    changes: Mapping[str, Any], positional: tuple[str, ...], args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with other values for some, each given as it was: by position or by name."""
    by_position = positional[: len(args)]
    args = tuple(changes.get(name, value) for name, value in zip(by_position, args))
    return args, kwargs | {name: value for name, value in changes.items() if name not in by_position}


def _first(returned: Any) -> torch.Tensor:
    return returned[0] if isinstance(returned, tuple) else returned


def _of_no_heads(output: torch.Tensor, whole: list[torch.Tensor]) -> torch.Tensor:
    """`[T, 0, ...]`, as if it were made of `output`, `[B, S, H, ...]`, and of `whole`, `[T, 0, ...]`."""
    nothing = output[:0].sum() + sum(x.sum() for x in whole)
    return output.new_zeros(whole[0].shape[0], 0, *output.shape[3:]) + nothing.to(output.dtype)
