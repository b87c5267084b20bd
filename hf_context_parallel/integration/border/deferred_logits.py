"""Logits that are not made before they are needed: hidden states of the shard, and the steps that lead to logits.

The forward of a language model applies its output embeddings to the hidden states, scales or caps the result token by
token, and computes a cross entropy. Here the output embeddings return this object. It records the steps. The cross
entropy replays them for some tokens at a time, so that neither whole logits nor those of a shard are ever held. Any
other use makes the logits, and gathers them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import cross_entropy

from ...distributed.host import beside, values_of
from ..deferred import Deferred
from .chunked_loss import chunked_sum


class Tokens(Protocol):
    """Tokens of a batch that this rank holds."""

    @property
    def whole_shape(self) -> tuple[int, int]:
        """Rows and tokens of the whole batch."""

    def take(self, x: torch.Tensor, fill: int) -> torch.Tensor:
        """Take the tokens of this rank, `[B, S_local, ...]`, of `[B, S, ...]`. Padding of the layout is `fill`."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gather `[B, S_local, ...]` to `[B, S, ...]`."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks that hold tokens of the batch."""


class TargetWeights:
    """Weights `[B, S]` of the targets of a batch, which one loss takes in place of its mean."""

    def __init__(self, weights: torch.Tensor):
        self._weights, self.uses = weights, 0

    def taken(self) -> torch.Tensor:
        """Return the weights, and count the use."""
        self.uses += 1
        return self._weights


class Step(NamedTuple):
    """Function that is applied to the logits of each token, with its other arguments."""

    function: Callable
    before: tuple
    after: tuple
    options: dict[str, Any]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return self.function(*self.before, logits, *self.after, **self.options)


CASTS = ("float", "double", "half", "bfloat16", "to", "type", "contiguous")
METHODS = (*CASTS, "tanh", "mul", "div", "add", "sub", "neg")
"""Methods of tensors that act on each entry by itself."""
FUNCTIONS = {
    torch.tanh,
    torch.mul,
    torch.div,
    torch.true_divide,
    torch.add,
    torch.sub,
    torch.neg,
    operator.mul,
    operator.truediv,
    operator.add,
    operator.sub,
    operator.neg,
    *(getattr(torch.Tensor, name) for name in METHODS),
}
"""Functions that act on each entry by itself. They are recorded."""


class DeferredLogits(Deferred):
    """Logits `[B, S, V]` of the whole batch, or `[B * S, V]`, that are made when they are used.

    Args:
        tokens: the tokens that this rank holds.
        hidden: `[B, S_local, D]`, the input of the output embeddings.
        embeddings: the function of `[..., D]` that computes `[..., V]`.
        parameters: the parameters of that function that are trained.
        chunk: number of tokens whose logits are held at a time; None chooses it by the vocabulary.
        weights: weights of the targets of the whole batch.
        steps: what is applied to the logits.
        flat: True for `[B * S, V]`.
    """

    def __init__(
        self,
        tokens: Tokens,
        hidden: torch.Tensor,
        embeddings: Callable[[torch.Tensor], torch.Tensor],
        parameters: list[torch.Tensor],
        chunk: int | None,
        weights: TargetWeights | None = None,
        steps: tuple[Step, ...] = (),
        flat: bool = False,
    ):
        self._tokens, self._hidden, self._embeddings, self._parameters = tokens, hidden, embeddings, parameters
        self._chunk, self._weights, self._steps, self._flat = chunk, weights, steps, flat

    @cached_property
    def local(self) -> torch.Tensor:
        """Logits of this rank's tokens, `[B, S_local, V]`."""
        return self._logits(self._hidden)

    def _make(self) -> torch.Tensor:
        logits = self._tokens.gather(self.local)
        return logits.flatten(0, 1) if self._flat else logits

    @cached_property
    def _width(self) -> int:
        """Number of logits of a token. No step changes it, so what is made of these logits keeps it."""
        with torch.no_grad():
            return self._embeddings(self._hidden[:1, :1]).shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole logits."""
        rows, length = self._tokens.whole_shape
        leading = (rows * length,) if self._flat else (rows, length)
        return torch.Size((*leading, self._width))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits."""
        with torch.no_grad():
            return self._logits(self._hidden[:1, :1]).dtype

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        return self._hidden.device

    @property
    def is_flat(self) -> bool:
        """Return whether the logits are `[B * S, V]`."""
        return self._flat

    def view(self, *shape: Any) -> Any:
        """Return the logits in another shape. `[B * S, V]` is recorded."""
        asked = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        rows, length, width = self.shape if not self._flat else (1, *self.shape)
        if asked in ((-1, width), (rows * length, width), (-1, -1)):
            return self._with(_flat=True)
        return self.whole.view(*shape)

    reshape = view

    def cross_entropy(
        self, target: torch.Tensor, ignore_index: int, reduction: str, label_smoothing: float
    ) -> torch.Tensor:
        """Compute the cross entropy of all tokens of the batch, on every rank. With weights, it is their weighted sum.

        Args:
            target: `[B * S]`, the targets of the whole batch.
            ignore_index: target of the tokens that are left out.
            reduction: `"sum"` or `"mean"`.
        """
        known, target = values_of(target)

        def shard_of(targets: torch.Tensor) -> torch.Tensor:
            return self._tokens.take(targets.view(self._tokens.whole_shape), ignore_index).flatten()

        chosen = beside((shard_of(known) != ignore_index).nonzero()[:, 0], target)
        mine = shard_of(target).index_select(0, chosen)

        weights = None
        if self._weights is not None:
            weights = self._tokens.take(self._weights.taken(), 0).flatten().index_select(0, chosen)

        def loss(hidden: torch.Tensor, tokens: slice) -> torch.Tensor:
            logits = self._logits(hidden)
            if weights is None:
                return cross_entropy(logits, mine[tokens], reduction="sum", label_smoothing=label_smoothing)
            losses = cross_entropy(logits, mine[tokens], reduction="none", label_smoothing=label_smoothing)
            return (losses * weights[tokens].to(losses.dtype)).sum()  # a product of matrices would be autocast

        trained = [*self._parameters, *self._trained_arguments()]
        hidden = self._hidden.flatten(0, 1).index_select(0, chosen)
        total = self._tokens.sum(chunked_sum(hidden, loss, self._width, trained, self._chunk))
        return total if reduction == "sum" or weights is not None else total / (target != ignore_index).sum()

    def _trained_arguments(self) -> list[torch.Tensor]:
        arguments = (x for step in self._steps for x in (*step.before, *step.after))
        return [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._embeddings(hidden)
        for step in self._steps:
            logits = step(logits)
        return logits

    def _with(self, **changes: Any) -> DeferredLogits:
        made: DeferredLogits = self._changed(**changes)
        vars(made).pop("local", None)  # which is computed anew
        return made

    def _recorded(self, function: Callable, args: tuple, options: dict[str, Any]) -> Any:
        """Record a function that acts on each entry by itself, or compute a cross entropy."""
        if function is cross_entropy:
            given = inspect.signature(cross_entropy).bind(*args, **options)
            given.apply_defaults()
            return _deferred_loss(given.arguments)
        if function not in FUNCTIONS:
            return None
        place = next((number for number, x in enumerate(args) if x is self), None)
        others = [x for x in args if x is not self]
        if place is None or len(others) != len(args) - 1 or not all(map(self._is_constant, others)):
            return None
        step = Step(function, args[:place], args[place + 1 :], options)
        return self._with(_steps=(*self._steps, step))

    def _is_constant(self, x: Any) -> bool:
        """Return whether an argument is the same for all tokens."""
        if not isinstance(x, torch.Tensor):
            return not isinstance(x, Deferred)
        return x.dim() == 0 or (x.numel() == x.shape[-1] == self._width)


LOSS_ARGUMENTS = {"input", "target", "ignore_index", "reduction", "label_smoothing"}
"""Arguments of the cross entropy that deferred logits take. Others must be None."""


def _deferred_loss(given: Mapping[str, Any]) -> torch.Tensor | None:
    """Compute a cross entropy of deferred logits, or return None if it needs whole logits.

    Args:
        given: all arguments of `torch.nn.functional.cross_entropy` by name.
    """
    logits, target, reduction = given["input"], given["target"], given["reduction"]
    if not isinstance(logits, DeferredLogits) or not logits.is_flat or target.dim() != 1:
        return None
    if reduction not in ("sum", "mean") or any(given[name] is not None for name in given.keys() - LOSS_ARGUMENTS):
        return None
    return logits.cross_entropy(target, given["ignore_index"], reduction, given["label_smoothing"])
