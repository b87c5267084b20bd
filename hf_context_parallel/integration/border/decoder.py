"""The border of a decoder: whole batches come in, shards are computed, whole outputs go out.

What lies outside of the border (towers, heads, losses, metrics, loops) is stock and is called with whole batches. For
some large tensors it gets stand-ins, see `deferred.py`. All N ranks compute the rest alike, each with the whole loss.
The gradient of one process is then the *mean* over the ranks, as DDP and FSDP2 compute it. What a rank computes of its
shard alone gets N times its gradient, since all N losses depend on it, and the mean divides by N again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ...compat import set_compiler, tree_leaves, tree_map
from ...cp_group import CPGroup, HasGroup
from ...data.batch import CONSUMED, PADDING, PASSED_ON, SHARD, take_columns
from ...data.ready import shard_of
from ...distributed.agreement import collective, fingerprint
from ...distributed.failures import FailureReport
from ..active_batch import ActiveBatch, active_batch, entered
from ..checks.agreement import REMEDIES, SAME_BATCHES, check_weights, sample, sampled, shown, signature, structure
from ..checks.inputs import accepted, check_range
from ..checks.model import check_call
from ..deferred import Deferred, made
from ..installation import carry_batches
from ..interfaces.compiled_attention import of_batch
from ..interfaces.masks import check_chunks
from ..interfaces.planned_mask import PlannedMask
from ..kept_attention import agreed_place, proposed_place
from ..model_registry import DEPENDS_ON_ATTN_NAME, NAME
from ..outer_call import outer_call
from ..patches.module_patch import ModulePatch, acts_by_token, by_name
from ..patches.positions import MADE_BY_MODEL
from ..patches.randomness import own_stream
from ..switches import switches
from .deferred_embeddings import DeferredEmbeddings
from .head import HeadCall
from .marks import Marks, Wanted

OF_LOSSES = ("labels", "shift_labels", "num_items_in_batch")
"""Arguments that only losses use."""
OF_HEADS = (*OF_LOSSES, "logits_to_keep")
"""Arguments that models pass down to all layers, and that only losses and heads use."""
OF_BATCHES = ("t_cond",)
"""Arguments that all tokens of a batch share."""
CACHES = ("cache", "past_key_values")
"""Names of the argument that holds a key/value cache."""


class DecoderBorder(ModulePatch):
    """Shards whole batches as they enter a decoder, and gathers its outputs.

    Args:
        cp: knows the CP group that is in use.
        model_type: the type of the decoder.
    """

    def __init__(self, cp: HasGroup, model_type: str):
        super().__init__()
        self.cp, self._model_type = cp, model_type
        self.handled: dict[str, set[str]] = {}
        """Class names of modules that mixed tokens in the last sharded call, each with how they were computed."""
        self.attention_checkpoints = "off"
        """Place where the last sharded call keeps attention."""
        self._whole = 0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Run the decoder on whole batches in this block."""
        self._whole += 1
        try:
            yield
        finally:
            self._whole -= 1

    def shards(self, given: Mapping[str, Any]) -> bool:
        """Return whether a call is sharded: not inside of another batch, and not to fill or read a cache.

        Args:
            given: the arguments of the call by name.
        """
        if active_batch() is not None or self._whole:
            return False
        if any(given.get(name) is not None for name in CACHES):
            return False
        return not given.get("use_cache") or torch.is_grad_enabled()

    def is_alone(self, given: Mapping[str, Any]) -> bool:
        """Return whether the call can run the attention of Transformers on this rank alone.

        That attention is not kept under gradient checkpointing, so nothing may have asked for that. A batch that
        describes documents cannot run it, since Transformers may let them see each other.

        Args:
            given: the arguments of the call by name.
        """
        group = self.cp.group
        described = ("position_ids", *CONSUMED[1:])
        return (
            group.size == group.first_size == group.groups.tensor.size == 1
            and not group.config.sequence_parallel
            and group.config.attention_checkpoints in ("auto", "off")
            and group.config.tile_tokens is None
            and not switches.shards_on_one_rank
            and self._model_type not in DEPENDS_ON_ATTN_NAME
            and all(given.get(name) is None for name in described)
        )

    @partial(torch.compiler.disable, recursive=False)
    def run(self, module: torch.nn.Module, forward: Callable, turn: Any, *args: Any, **kwargs: Any) -> Any:
        compiler = set_compiler(None)  # nothing but the decoder is compiled
        outer = outer_call()
        try:
            given = by_name(forward, args, kwargs)
            if not self.shards(given):
                args, kwargs = made((args, kwargs))
                set_compiler(compiler)
                return forward(*args, **kwargs)
            resumed = outer.compiler if compiler is None and outer is not None else compiler
            if self.is_alone(given) if outer is None else outer.is_alone:
                set_compiler(resumed)
                output = forward(*args, **kwargs)
                if isinstance(outer, HeadCall):
                    outer.take_shard(module, AllTokens(given))
                return output
            call = _Call(module, given, self.cp.group)
            self.attention_checkpoints = call.batch.attention_checkpoints
            try:
                call.take_media()
                with entered(call.batch), own_stream(self.cp.group, module.training):
                    set_compiler(resumed)
                    try:
                        output = forward(**call.local)
                    finally:
                        set_compiler(None)
                self.handled = call.batch.handled
                output = call.gathered(output)
                call.failure_report.leave()
                return output
            except BaseException as error:
                call.group.exchange.interrupt()
                call.failure_report.publish(error)
                raise
        finally:
            set_compiler(compiler)


class _Call:
    """One call of a decoder with a whole batch.

    Args:
        decoder: the decoder.
        given: its arguments by name, for the whole batch.
        group: the ranks that hold the shards.

    Raises:
        ValueError: on all ranks of the group, if the batch or the model of a rank cannot be exact, or they differ.
    """

    def __init__(self, decoder: PreTrainedModel, given: dict[str, Any], group: CPGroup):
        self._decoder, self.group = decoder, group
        self.failure_report = FailureReport(group.groups.same_batch, "the forward of a decoder")
        computes_loss = given.get("labels") is not None and decoder.get_output_embeddings() is not None
        given = {name: value for name, value in given.items() if value is not None and name not in OF_HEADS}
        call, masks = outer_call(), _take_masks(given)
        if call is not None:
            call.met_decoder = True
        _add_documents(decoder, given)
        compared: dict[str, torch.nn.Parameter] = {}
        model = decoder if call is None else call.model
        embeddings, ids = given.get("inputs_embeds"), {}
        if isinstance(embeddings, DeferredEmbeddings) and not embeddings.is_made:
            ids = {"input_ids": embeddings.ids}
            given["inputs_embeds"] = embeddings.ids[..., None]  # which are sharded in their place
        elif isinstance(embeddings, Deferred):
            given["inputs_embeds"] = embeddings = embeddings.whole
        # A model may pass embeddings on under another name too.
        given = {name: x.whole if isinstance(x, DeferredEmbeddings) else x for name, x in given.items()}
        with self.failure_report.opening():
            with collective(group.groups.same_batch, "batches or models", SAME_BATCHES) as notes:
                notes.alarm, notes.remedies = group.exchange.interrupted, REMEDIES
                if computes_loss:
                    raise ValueError(
                        f"{type(decoder).__name__} was given labels, and its loss is computed inside of the decoder, "
                        "which has the tokens of a shard. Compute the loss around it, of its logits, or run the model "
                        "in `with cp.whole(model):`."
                    )
                check_call(decoder, model, given, group)
                compared = sampled(decoder, group)
                self.local = self._shard(_embedded(decoder, given))
                shard = self.local[SHARD]
                wanted = embeddings.wanted(shard) if isinstance(embeddings, DeferredEmbeddings) else []
                labels = {} if call is None else {name: call.given.get(name) for name in OF_LOSSES[:2]}
                labels = {name: value for name, value in labels.items() if isinstance(value, torch.Tensor)}
                if isinstance(call, HeadCall):
                    check_range(call.model, {**given, **labels, **ids}, shard, values=group.config.check_batch)
                else:
                    check_range(decoder, given, shard, values=group.config.check_batch)
                for mask in _planned(masks):
                    check_chunks(mask.pattern, decoder.config.model_type, shard)
                checkpointed = carry_batches(decoder)
                tokens, device = shard.batch_size * shard.layout.length, _device_of(self.local)
                kept = proposed_place(model, group, tokens, device, checkpointed)
                notes.number = kept.number
                mark = {**signature(decoder), "the model is checkpointed": checkpointed}
                if compared:
                    mark |= structure(model, group)
                compared_labels = labels if group.config.check_batch else {}
                patterns = sorted(str(mask.pattern) for mask in _planned(masks))  # layer types come in any order
                whole = {**mark, "the masks": patterns, **compared_labels}
                if call is not None:
                    others = call.given.keys() - {*OF_LOSSES}
                    whole |= sample({x: call.given[x] for x in others if call.given[x] is not given.get(x)}, group)
                notes.fingerprint = fingerprint({"batch": shard.fingerprint, **whole})
                notes.shown = {**shown(ids or given, group), **whole}
            if notes.alarm:
                group.exchange.settle(group.groups)
            check_weights(model, compared, group)
        self.batch = ActiveBatch(self.local.pop(SHARD), group, padding_reads=call is None or call.uses_padding)
        self.batch.attention_checkpoints = agreed_place(group, kept, notes.numbers)
        for mask in _planned(masks):
            of_batch(mask, self.batch)
        self.local |= masks
        self._embeddings, self._wanted = embeddings, wanted

    def take_media(self) -> None:
        """Put features of media into the arguments for the shard, and into the embeddings of its tokens."""
        others = [x for x in tree_leaves(self.local) if isinstance(x, Wanted)]
        taken = Wanted.taken([*self._wanted, *others])
        mine, found = taken[: len(self._wanted)], dict(zip(map(id, others), taken[len(self._wanted) :]))
        if others:
            self.local = tree_map(lambda x: found.get(id(x), x), self.local)
        if isinstance(self._embeddings, DeferredEmbeddings):
            ids = self.local["inputs_embeds"][..., 0]
            self.local["inputs_embeds"] = self._embeddings.of_shard(ids, self.batch.shard, self._wanted, mine)

    def _shard(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments for the shard of this rank."""
        known = {*PADDING, *CONSUMED, *PASSED_ON}
        inputs = {name: value for name, value in given.items() if name in known}
        local = shard_of(inputs, self.group.config, self.group.rank)
        shard = local[SHARD]
        positions = shard.layout.positions(shard.rank)
        for name, value in given.items():
            if name in known or name in ("use_cache", *CACHES):
                continue
            inside = () if isinstance(value, torch.Tensor) else tree_leaves(value)
            features = [leaf for leaf in inside if isinstance(leaf, (torch.Tensor, Deferred))]
            if features:
                every = (Marks(x, shard) for x in given.values() if Marks.can_be(x, shard))
                marks = next((marks for marks in every if all(len(x) == marks.count for x in features)), None)
                if marks is None:
                    raise ValueError(
                        f"{type(self._decoder).__name__} was given {name}, a {type(value).__name__} of tensors, which "
                        "cannot be sharded: they do not have a row for each token that a mask among the arguments "
                        "marks. Leave it out, or run the model in `with cp.whole(model):`."
                    )
                value = tree_map(partial(_wanted, marks=marks), value)
            if isinstance(value, torch.Tensor) and value.dim() and name not in OF_BATCHES:
                if tuple(value.shape[:2]) != (shard.batch_size, shard.length):
                    raise ValueError(
                        f"{type(self._decoder).__name__} was given {name} of shape {tuple(value.shape)}, and only "
                        f"tensors that begin with its {shard.batch_size} rows of {shard.length} tokens can be "
                        "sharded. Leave it out, or run the model in `with cp.whole(model):`."
                    )
                value = take_columns(value, positions, shard.layout.length, 0)
            local[name] = value
        unknown = {"position_ids", "use_cache"} - set(accepted(self._decoder, ("position_ids", "use_cache")))
        return {name: value for name, value in local.items() if name not in unknown}

    def gathered(self, output: Any) -> Any:
        """Gather the outputs of the shards. A language-model head gets the hidden states of the shard.

        Raises:
            RuntimeError: if no layer used our attention.
        """
        if not self.batch.handled:
            raise RuntimeError(
                f"{type(self._decoder).__name__} ran on a shard, and none of its attention layers used {NAME!r}, so "
                f"each rank attended to its own shard alone. Load the model with attn_implementation={NAME!r}."
            )
        call = outer_call()
        keep = isinstance(call, HeadCall) and call.take_shard(self._decoder, self.batch)
        if isinstance(output, Mapping):
            values = {
                name: value if keep and name == "last_hidden_state" else self._gathered(value, name == "router_logits")
                for name, value in output.items()
            }
            return type(output)(**values)
        if isinstance(output, tuple):
            return tuple(x if keep and not place else self._gathered(x) for place, x in enumerate(output))
        return output if keep else self._gathered(output)

    def _gathered(self, value: Any, by_rows: bool = False) -> Any:
        """Gather each tensor `[B, S_local, ...]` inside a value.

        Args:
            by_rows: True if tensors may be `[B * S_local, ...]` too.
        """
        rows, length = self.batch.shard.local_shape

        def gather(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if by_rows and x.dim() == 2 and len(x) == rows * length:
                return self.batch.gather(x.unflatten(0, (rows, length))).flatten(0, 1)
            return self.batch.gather(x) if x.dim() > 2 and tuple(x.shape[:2]) == (rows, length) else x

        return tree_map(gather, value)


def _wanted(x: Any, marks: Marks) -> Any:
    return Wanted(x, marks) if isinstance(x, (torch.Tensor, Deferred)) else x


class AllTokens:
    """Tokens of a batch that one rank holds; see `deferred_logits.Tokens`."""

    def __init__(self, given: Mapping[str, Any]):
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        self.whole_shape = self.local_shape = tuple(tokens.shape[:2])

    def take(self, x: torch.Tensor, fill: int) -> torch.Tensor:
        """Return the tensor."""
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tensor."""
        return x


def _device_of(given: Mapping[str, Any]) -> torch.device:
    """Return the device of the tokens among the arguments of a decoder."""
    tokens = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
    device: torch.device = tokens.device
    return device


def _take_masks(given: dict[str, Any]) -> dict[str, Any]:
    """Remove the planned masks from the arguments of the decoder, and put their padding mask in as `attention_mask`.

    Returns:
        The arguments of the decoder that hold planned masks, or dictionaries of them by layer type.
    """
    masks = {name: value for name, value in given.items() if _planned({name: value})}
    for name in masks:
        del given[name]
    for mask in _planned(masks):
        if mask.padding is not None:
            given["attention_mask"] = mask.padding
    return masks


def _planned(masks: Mapping[str, Any]) -> list[PlannedMask]:
    values = [x for value in masks.values() for x in (value.values() if isinstance(value, Mapping) else [value])]
    return [value for value in values if isinstance(value, PlannedMask)]


def _add_documents(decoder: PreTrainedModel, given: dict[str, Any]) -> None:
    """Add what the model around the decoder was told of documents, and did not pass on as the decoder cannot take it.

    Without it, documents would see each other, as they do in Transformers.
    """
    call = outer_call()
    if call is None:
        return
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    parameters = inspect.signature(decoder.forward).parameters
    for name in ("position_ids", *CONSUMED[1:]):
        value = call.given.get(name)
        if value is None or name in given or name in parameters or tokens is None:
            continue
        if name != "position_ids" or tuple(value.shape[-1:]) == tuple(tokens.shape[1:2]):
            given[name] = value


def reads_ids(decoder: PreTrainedModel) -> bool:
    """Return whether a decoder reads its ids beside their embeddings, so that embeddings alone do not do."""
    readers = {name for name, argument in MADE_BY_MODEL if argument == "input_ids"}
    by_layer = "per_layer_inputs" in inspect.signature(decoder.forward).parameters
    return by_layer or any(type(module).__name__ in readers for module in decoder.modules())


def _embedded(decoder: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """Embed whole rows if embeddings may depend on the row, as NEFTune's hook lets them depend on its length."""
    embeddings = decoder.get_input_embeddings()
    if "input_ids" not in given or not isinstance(embeddings, torch.nn.Module):
        return given
    if acts_by_token(embeddings):
        return given
    if "inputs_embeds" not in inspect.signature(decoder.forward).parameters:
        return given
    if reads_ids(decoder):
        raise ValueError(
            f"{type(decoder).__name__} reads input_ids beside their embeddings, and hooks on its embedding, such as "
            "those of NEFTune, or a class of your own, need embeddings of whole rows. Remove them, or run the model "
            "in `with cp.whole(model):`."
        )
    given = dict(given)
    return given | {"inputs_embeds": embeddings(given.pop("input_ids"))}
