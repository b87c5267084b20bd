"""The head of a language model: it stays on the shard, and makes logits of some tokens at a time, for the loss.

Any other head gets the hidden states of the whole batch, and runs as it was written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ...compat import language_model_classes, set_compiler
from ...config import ContextParallelConfig
from ...cp_group import HasGroup
from ...data.batch import IGNORED
from ...distributed.agreement import collective, is_agreed
from ...distributed.failures import FailureReport
from ...distributed.host import Twin, on_host
from ..checks.media import explained, warn_of_missing_media
from ..checks.model import has_forward_of, stock_class
from ..deferred import has_deferred, made
from ..model_registry import decoder_of
from ..outer_call import OuterCall, in_call, outer_call
from ..patches.module_patch import ModulePatch, by_name, has_hooks
from .deferred_logits import DeferredLogits, TargetWeights, Tokens

LABELS = ("labels", "shift_labels")
"""Arguments of a language model that hold its targets."""
TARGET_WEIGHTS = "target_weights"
"""Argument `[B, S]` with a weight for each target: the loss is the weighted sum, where it was a mean.
It is this package's own, for dynamic CP, and no model sees it."""
Z_LOSS = "z_loss_coefficient"
"""Field of a configuration that weighs a mean over all logits, those of padding too."""


class Border(Protocol):
    """Border of a decoder, as the model around it sees it."""

    cp: HasGroup

    def shards(self, given: Mapping[str, Any]) -> bool:
        """Return whether a call with these arguments is sharded."""

    def is_alone(self, given: Mapping[str, Any]) -> bool:
        """Return whether one rank computes a batch with these arguments as Transformers does."""


class HeadCall(OuterCall):
    """One call of a language model. Its output embeddings return deferred logits.

    Args:
        model: the language model.
        decoder: its decoder.
        given: the arguments of the call by name.
        is_alone: True if one rank computes the whole batch.
        config: the CP settings.
        compiler: what compiles the decoder. The head is not compiled.
        weights: weights of the targets.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: PreTrainedModel,
        given: Mapping[str, Any],
        is_alone: bool,
        config: ContextParallelConfig,
        compiler: Any,
        weights: torch.Tensor | None,
    ):
        super().__init__(model, decoder, given, is_alone, compiler)
        self._config = config
        self._weights = None if weights is None else TargetWeights(weights)
        self._tokens: Tokens | None = None
        self._has_deferred = False

    @property
    def uses_padding(self) -> bool:
        """Return whether the caller may use outputs of the decoder at padding: not if it gets the loss alone."""
        asked = self.given.get("output_hidden_states"), getattr(self.model.config, "output_hidden_states", False)
        uses = any(asked) or bool(getattr(self.model.config, Z_LOSS, 0))
        return uses or not self._leaves_out_logits or self._has_targets_in_padding

    @property
    def _has_targets_in_padding(self) -> bool:
        """Return whether a target may be predicted from padding: a label lies on padding, or on the token after it."""
        mask = self.given.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return False
        padding = on_host(mask) == 0
        near = padding | pad(padding, (1, 0))[:, :-1]
        labels = (self.given.get(name) for name in LABELS)
        return any(
            x.shape == near.shape and bool(((on_host(x) != IGNORED) & near).any()) for x in labels if x is not None
        )

    @property
    def _leaves_out_logits(self) -> bool:
        return self._config.logits == "auto" and self.given.get("labels") is not None and self.model.training

    def take_shard(self, decoder: PreTrainedModel, tokens: Tokens) -> bool:
        """Return whether the head takes the hidden states of the shard, which the decoder is about to return."""
        if decoder is not self.decoder:
            return False
        self._tokens = tokens
        return True

    def defer(self, embeddings: torch.nn.Module, forward: Callable, hidden: torch.Tensor) -> DeferredLogits | None:
        """Return deferred logits for the hidden states of the shard, or None for other hidden states.

        Args:
            embeddings: the output embeddings.
            forward: their forward without the patch.
            hidden: the input of the output embeddings.
        """
        if self._tokens is None or hidden.dim() != 3 or tuple(hidden.shape[:2]) != self._tokens.local_shape:
            return None

        def embed(x: torch.Tensor) -> torch.Tensor:
            if isinstance(embeddings, FSDPModule):  # its hooks belong to the pass that has called this patch
                embeddings.unshard()
                return forward(x)
            with in_call(None):  # so that the output embeddings compute
                return embeddings(x)

        self._has_deferred = True
        trained = [parameter for parameter in embeddings.parameters() if parameter.requires_grad]
        return DeferredLogits(self._tokens, hidden, embed, trained, self._config.loss_chunk_tokens, self._weights)

    def finished(self, output: Any) -> Any:
        """Return the output of the model with logits and features of media, or with None in their place.

        Both are left out in training with labels, unless `config.logits` asks for them.

        Raises:
            ValueError: if the model made its logits without calling its output embeddings, or has not weighed targets.
        """
        if self._tokens is not None and not self._has_deferred:
            raise ValueError(
                f"{type(self.model).__name__} did not call its output embeddings, so that its logits are those of a "
                "shard. Take the base model and a head of your own, or run the model in `with cp.whole(model):`."
            )
        if self._weights is not None and self._weights.uses != 1:
            raise _no_weights(self.model)
        if isinstance(output, Mapping):
            return type(output)(**{name: self._made(value) for name, value in output.items()})
        return tuple(map(self._made, output)) if isinstance(output, tuple) else self._made(output)

    def _made(self, value: Any) -> Any:
        if isinstance(value, DeferredLogits) and self._config.logits == "shard":
            return value.local
        return None if self._leaves_out_logits and has_deferred(value) else made(value)


class OuterPatch(ModulePatch):
    """Opens the calls of a model around a decoder.

    Args:
        border: the border of the decoder.
    """

    def __init__(self, border: Border):
        super().__init__()
        self._border = border

    @partial(torch.compiler.disable, recursive=False)
    def run(self, module: torch.nn.Module, forward: Callable, turn: Any, *args: Any, **kwargs: Any) -> Any:
        compiler = set_compiler(None)
        weights = kwargs.pop(TARGET_WEIGHTS, None)
        try:
            given = by_name(forward, args, kwargs)
            if not self._border.shards(given):
                set_compiler(compiler)
                return forward(*args, **kwargs)
            alone, parameters = self._border.is_alone(given), inspect.signature(forward).parameters
            if not alone:
                warn_of_missing_media(module, parameters, given)
            if not alone and "use_cache" in parameters:
                args, kwargs = (), {**given, "use_cache": False}  # else some make a cache for the decoder
            if not stays_on_shard(module, given):
                if weights is not None:
                    raise _no_weights(module)
                with in_call(OuterCall(module, decoder_of(module), given, alone)) as call, self._together(call):
                    set_compiler(compiler)
                    return made(forward(*args, **kwargs))
            call = HeadCall(module, decoder_of(module), given, alone, self._border.cp.group.config, compiler, weights)
            for name in LABELS:
                if isinstance(kwargs.get(name), torch.Tensor):
                    kwargs[name] = Twin.of(kwargs[name])
            with in_call(call), self._together(call):
                return call.finished(forward(*args, **kwargs))
        finally:
            set_compiler(compiler)

    @contextmanager
    def _together(self, call: OuterCall) -> Iterator[None]:
        """Let all ranks of the group raise an error that one of them raised before it came to the decoder.

        The others wait for it where they agree next: at the decoder, at a tower, or here.

        Raises:
            ValueError: on every rank, in place of the error.
        """
        try:
            yield
        except Exception as error:
            ranks = self._border.cp.group.groups.same_batch
            if call.met_decoder or call.is_alone or ranks.size == 1:
                raise
            with FailureReport(ranks, "a language-model head").opening():
                if is_agreed(error):
                    raise
                with collective(ranks):
                    raise explained(error, call.model, call.given).with_traceback(error.__traceback__) from None


class EmbeddingsPatch(ModulePatch):
    """Lets the output embeddings of a language model return deferred logits."""

    def run(self, module: torch.nn.Module, forward: Callable, turn: Any, *args: Any, **kwargs: Any) -> Any:
        call = outer_call()
        if isinstance(call, HeadCall) and len(args) == 1 and not kwargs:
            deferred = call.defer(module, forward, args[0])
            if deferred is not None:
                return deferred
        return forward(*args, **kwargs)


def _no_weights(model: PreTrainedModel) -> ValueError:
    return ValueError(
        f"{type(model).__name__} computes its loss in a way in which its targets cannot be weighed. With dynamic=True "
        "they must be, since samples of several batches share a row, and the loss is a mean over each batch. Set "
        "dynamic=False."
    )


def stays_on_shard(model: PreTrainedModel, given: Mapping[str, Any]) -> bool:
    """Return whether a model is a language model of Transformers whose head acts on each token by itself.

    Args:
        given: the arguments of its call by name.
    """
    kept = given.get("logits_to_keep")
    if isinstance(kept, torch.Tensor) or kept:
        return False
    embeddings = model.get_output_embeddings()
    if not isinstance(embeddings, torch.nn.Module) or has_hooks(embeddings):  # hooks would see no logits
        return False
    if decoder_of(model).get_output_embeddings() is embeddings:  # the decoder is a language model with a head
        return False
    stock = stock_class(model, language_model_classes())
    return stock is not None and has_forward_of(stock, model)
