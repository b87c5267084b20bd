"""Embeddings of a whole batch that are not made: a rank embeds its own tokens, and takes the features of its media.

The model around a decoder embeds the batch, and puts features of media in the places of placeholders. Here its input
embeddings return an object that records this, and the border of the decoder computes it for the tokens of the shard.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...data.shard import Shard
from ...distributed.host import beside
from ..active_batch import active_batch
from ..checks.media import REMEDY
from ..deferred import Deferred, made
from ..outer_call import in_call, outer_call
from ..patches.module_patch import ModulePatch, acts_by_token
from ..towers.deferred_features import CASTS, DeferredFeatures
from .marks import Marks, Wanted

SCALES = (operator.mul, torch.mul, torch.Tensor.mul)
"""Functions that multiply."""


class Placed:
    """Step that puts features in the places of marked tokens.

    Args:
        mask: `[B, S, 1]`.
        features: `[..., D]`, with a vector for each marked token.
    """

    def __init__(self, mask: torch.Tensor, features: torch.Tensor | DeferredFeatures):
        self.mask, self.features = mask, features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.masked_scatter(self.mask, made(self.features))


class Filled:
    """Step that gives marked tokens, `[B, S, 1]`, the same number everywhere."""

    def __init__(self, mask: torch.Tensor, value: float):
        self.mask, self.value = mask, value

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(self.mask, self.value)


class DeferredEmbeddings(Deferred):
    """Embeddings `[B, S, D]` of a whole batch.

    Args:
        embed: the function that embeds ids.
        ids: `[B, S]`.
        some: embeddings of some of the ids, `[B, 1, D]`.
    """

    def __init__(self, embed: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, some: torch.Tensor):
        self._embed, self.ids, self._some = embed, ids, some
        self._steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()

    def wanted(self, shard: Shard) -> list[Wanted]:
        """List the features that the tokens of a shard take.

        Raises:
            ValueError: if there are fewer features than tokens that take them.
        """
        placed = [step for step in self._steps if isinstance(step, Placed)]
        found = [Wanted(step.features, Marks(step.mask, shard)) for step in placed]
        for features, marks in ((x.features, x.marks) for x in found):
            count = features.shape[:-1].numel()
            if count < marks.count:
                raise ValueError(
                    f"{marks.count} tokens take the place of media, and there are {count} features for them. {REMEDY}."
                )
        return found

    def of_shard(
        self, ids: torch.Tensor, shard: Shard, wanted: Sequence[Wanted], taken: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Embed the tokens of a shard, `[B, S_local, D]`.

        Args:
            ids: `[B, S_local]`.
            shard: the shard.
            wanted: what `wanted` returned.
            taken: these features.
        """
        x, rest = self._embed(ids), iter(zip(wanted, taken))
        for step in self._steps:
            if isinstance(step, Placed):
                place, features = next(rest)
                x = x.masked_scatter(beside(place.marks.local, x)[..., None], features)
            elif isinstance(step, Filled):
                x = x.masked_fill(beside(Marks(step.mask, shard).local, x)[..., None], step.value)
            else:
                x = step(x)
        return x

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.ids.shape, self._some.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        return self._some.dtype

    @property
    def device(self) -> torch.device:
        return self._some.device

    def _make(self) -> torch.Tensor:
        x = self._embed(self.ids)
        for step in self._steps:
            x = step(x)
        return x

    def _recorded(self, function: Callable, args: tuple, options: dict[str, Any]) -> Any:
        """Record features that are put in, casts, and products with a number."""
        if function is torch.Tensor.requires_grad_:  # the hook that asks for it runs again on what is made
            return self
        if function is torch.Tensor.expand_as and isinstance(args[0], torch.Tensor):  # a mask of tokens
            return args[0].expand(self.shape)
        if self.is_made or args[0] is not self:
            return None
        if function in (torch.Tensor.masked_scatter, torch.masked_scatter) and len(args) == 3:
            return self._with_features(*args[1:])
        if function in (torch.Tensor.masked_fill, torch.masked_fill) and len(args) == 3:
            return self._filled(*args[1:])
        others = (*args[1:], *options.values())
        if function in CASTS and not any(isinstance(x, (torch.Tensor, Deferred)) for x in others):
            if function(self._some, *args[1:], **options) is self._some:  # a cast of tensors returns the tensor itself
                return self
            return self._after(lambda x: function(x, *args[1:], **options))
        if function in SCALES and all(isinstance(x, (int, float)) for x in others):
            return self._after(lambda x: function(x, *args[1:], **options))
        return None

    def _with_features(self, mask: torch.Tensor, features: Any) -> DeferredEmbeddings | None:
        """Put features in, if the mask marks whole tokens and there is a vector for each."""
        if not self._is_by_token(mask) or isinstance(features, DeferredEmbeddings):
            return None
        if features.dtype != self.dtype or features.dim() < 2 or features.shape[-1] != self.shape[-1]:
            return None
        return self._after(Placed(mask[..., :1], features), some=self._some)

    def _filled(self, mask: torch.Tensor, value: Any) -> DeferredEmbeddings | None:
        """Give marked tokens a number, if the mask marks whole tokens."""
        if not self._is_by_token(mask) or not isinstance(value, (int, float)):
            return None
        return self._after(Filled(mask[..., :1], value), some=self._some)

    def _is_by_token(self, mask: torch.Tensor) -> bool:
        """Return whether a mask marks whole tokens: `[B, S, 1]`, or this expanded."""
        return mask.dim() == 3 and mask.shape[:2] == self.ids.shape and (mask.shape[2] == 1 or not mask.stride(2))

    def _after(
        self, step: Callable[[torch.Tensor], torch.Tensor], some: torch.Tensor | None = None
    ) -> DeferredEmbeddings:
        """Record a step. Without `some`, it acts on each entry by itself."""
        some = step(self._some) if some is None else some
        changed: DeferredEmbeddings = self._changed(_steps=(*self._steps, step), _some=some)
        return changed

    def __getitem__(self, index: Any) -> Any:
        by_token = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not self.is_made
        return SelectedEmbeddings(self, index) if by_token else super().__getitem__(index)


class SelectedEmbeddings(Deferred):
    """Embeddings where a mask `[B, S]` or `[B, S, D]` is True, which models count and do not use."""

    def __init__(self, embeddings: DeferredEmbeddings, mask: torch.Tensor):
        self._embeddings, self._mask = embeddings, mask

    @property
    def shape(self) -> torch.Size:
        return torch.Size((int(self._mask.sum()), *self._embeddings.shape[self._mask.dim() :]))

    @property
    def dtype(self) -> torch.dtype:
        return self._embeddings.dtype

    @property
    def device(self) -> torch.device:
        return self._embeddings.device

    def _make(self) -> torch.Tensor:
        return self._embeddings.whole[self._mask]


class InputEmbeddingsPatch(ModulePatch):
    """Lets the input embeddings of a model with media return deferred embeddings, for the batch that it was given."""

    def run(self, module: torch.nn.Module, forward: Callable, turn: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or kwargs or len(args) != 1:
            return forward(*args, **kwargs)
        call, ids = outer_call(), args[0]
        if (
            call is None
            or call.is_alone
            or call.met_decoder
            or active_batch() is not None
            or not acts_by_token(module)
        ):
            return forward(ids)
        given = call.given.get("input_ids")
        if not isinstance(given, torch.Tensor) or given.shape != ids.shape:
            return forward(ids)

        def embed(ids: torch.Tensor) -> torch.Tensor:
            with in_call(None):  # so that the module computes
                embeddings: torch.Tensor = module(ids)
            return embeddings

        with torch.no_grad():
            some = forward(ids[:, :1])
        return DeferredEmbeddings(embed, ids.clone(), some)  # some models write to their ids afterwards
