"""Inputs that a model cannot be exact with: values out of range, and calls without what `cp.shard` yields."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ...cp_group import CPGroup
from ...data.batch import IGNORED
from ...data.shard import Shard
from ...distributed.agreement import gather_numbers
from ...distributed.mesh import Ranks
from ..model_registry import UNSHIFTED, learned_positions

ENCODED = ("encoder_hidden_states", "encoder_outputs", "cross_attention_states")
"""What models take of an encoder, by its names in their forwards."""


def check_range(model: PreTrainedModel, batch: Mapping[str, Any], shard: Shard, values: bool) -> None:
    """Refuse tokens, labels and positions that the model has nothing for, which the ranks that hold them would
    raise for while the others wait.

    Args:
        batch: the whole one, or what the collator yields.
        values: whether tokens and labels are looked at.
    """
    if values:
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        vocabulary = "take the tokenizer of this model, or call model.resize_token_embeddings()"
        if isinstance(embeddings, torch.nn.Embedding):
            _check_values(model, batch, "input_ids", embeddings.num_embeddings, vocabulary)
        if isinstance(head, torch.nn.Linear):
            for name in ("labels", "shift_labels"):
                remedy = f"{vocabulary}; {IGNORED} is no target"
                _check_values(model, batch, name, head.out_features, remedy, IGNORED)
        kinds = getattr(model.config.get_text_config(), "type_vocab_size", None)
        if kinds:
            remedy = "leave token_type_ids out, or make them by its tokenizer"
            _check_values(model, batch, "token_type_ids", kinds, remedy)
    length, positions = max(shard.all_lengths), learned_positions(model)
    if positions is not None and length > positions:
        raise ValueError(
            f"the batch has a token at position {length - 1}, and {type(model).__name__} has learned the "
            f"positions 0 to {positions - 1}: cut rows or documents to {positions} tokens, or take a model with "
            "more."
        )
    if model.config.model_type in UNSHIFTED and shard.has_targets and shard.unshifted is None:
        raise ValueError(
            f"{type(model).__name__} compares each token's logits with the token's own label, and the batch has "
            "shift_labels alone. Give labels."
        )


def _check_values(
    model: PreTrainedModel, batch: Mapping[str, Any], name: str, most: int, remedy: str, *beside: int
) -> None:
    """Refuse values of a batch's tensor that are neither 0 to `most - 1` nor among those `beside`."""
    values = batch.get(name)
    if values is None:
        return
    wrong = values[(values < 0) | (values >= most)]
    for value in beside:
        wrong = wrong[wrong != value]
    if len(wrong):
        raise ValueError(f"{name} has {int(wrong[0])}, and {type(model).__name__} takes 0 to {most - 1}: {remedy}.")


def refuse_part(module: PreTrainedModel, passed: PreTrainedModel) -> None:
    """Refuse a part of the model that was passed, run by itself: what the model does with its outputs was not seen
    to, as where its `forward` is called and not it."""
    if any(part is module for part in passed.modules()):
        raise ValueError(
            f"{type(module).__name__} runs by itself in a block for the {type(passed).__name__} that it is "
            "a part of, with labels: that model's loss would be computed unseen. Call it as model(**local), not "
            "its forward; or pass the part to cp.shard, and leave the labels out."
        )


def check_inputs(
    module: torch.nn.Module, given: Mapping[str, Any], our_positions: torch.Tensor, group: CPGroup
) -> None:
    """Refuse a call without the inputs that make a shard's result that of the whole.

    Args:
        given: what the model's forward is given, by name.
        our_positions: the shard's `position_ids`.
    """
    required = {"position_ids", "use_cache"}
    if given.get("labels") is not None:
        required |= {"shift_labels", "num_items_in_batch"}
    complete = all(given.get(name) is not None for name in required & set(accepted(module, required)))
    labels, targets, positions = (given.get(name) for name in ("labels", "shift_labels", "position_ids"))
    ranks = group.groups.same_batch
    # The same tensors in nearly every call; a copy, perhaps on another device, is compared by its values. That
    # comes last, for it waits for the other ranks.
    if not complete or given.get("use_cache") or not _same(positions, our_positions, ranks):
        raise ValueError(
            "the model must be called with all that cp.shard yields: position_ids, use_cache=False, and with "
            "labels also shift_labels and num_items_in_batch. Call it as model(**local); call other models, and "
            "generate(), outside the block. Where its forward takes no such inputs, pass the model to cp.shard."
        )
    if not _same(labels, targets, ranks):
        raise ValueError(
            "labels and shift_labels differ: cp.shard yields both shifted, each token's being the next one's, and "
            "the loss goes by shift_labels. Change both alike, or the labels of the batch before cp.shard."
        )
    for name in ENCODED:
        if given.get(name) is not None:
            raise ValueError(
                f"{name}: cross-attention to an encoder's tokens is not known to be exact on shards of the "
                "decoder's. Leave it out, or run the model outside the block."
            )
    kept = given.get("logits_to_keep")
    if isinstance(kept, torch.Tensor) or kept:
        raise ValueError(
            "logits_to_keep would keep the last tokens of each rank's shard, which are not the sequence's. Leave "
            "it out, and take what you need of cp.gather(logits)."
        )
    wanted = given.get("output_hidden_states")
    if group.config.sequence_parallel and (module.config.output_hidden_states if wanted is None else wanted):
        raise ValueError(
            "output_hidden_states=True: with sequence_parallel=True layers return a share of the shard's tokens, "
            "which cp.gather does not restore. Leave one of the two off."
        )


def _same(given: torch.Tensor | None, ours: torch.Tensor | None, ranks: Ranks) -> bool:
    """Whether a tensor that the model is given has the values that it should, on every rank; True without one.

    That two tensors are not one all ranks find alike, so all come here to compare.
    """
    if given is None or ours is None or given is ours:
        return True
    [differs] = gather_numbers(ranks, not torch.equal(given.cpu(), ours.cpu()))
    return not any(differs)


def accepted(module: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names` that a module's forward can be given."""
    parameters = inspect.signature(module.forward).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return [name for name in names if anything or name in parameters]
