"""Checks of the inputs of a model: values in range, and a call with all that `cp.shard` yields."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...cp_group import CPGroup
from ...data.batch import IGNORED
from ...data.shard import Shard
from ...distributed.agreement import gather_numbers
from ...distributed.host import on_host
from ...distributed.mesh import Ranks
from ..model_registry import UNSHIFTED, learned_positions

ENCODED = ("encoder_hidden_states", "encoder_outputs", "cross_attention_states")
"""Names of arguments that pass the outputs of an encoder to a decoder."""


def check_range(model: PreTrainedModel, batch: Mapping[str, Any], shard: Shard, values: bool) -> None:
    """Refuse tokens, labels and positions that the model has no embedding or logit for.

    Otherwise the ranks that hold them would raise while the others wait.

    Args:
        batch: the whole batch, or the shard that the collator yields.
        values: whether to read tokens and labels.

    Raises:
        ValueError: naming the input, the value and the range.
    """
    if values:
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        vocabulary = "Take the tokenizer of this model, or call model.resize_token_embeddings()"
        if isinstance(embeddings, torch.nn.Embedding):
            _check_values(model, batch, "input_ids", embeddings.num_embeddings, vocabulary)
        if isinstance(head, torch.nn.Linear):
            for name in ("labels", "shift_labels"):
                remedy = f"{vocabulary}; {IGNORED} marks a token that is no target"
                _check_values(model, batch, name, head.out_features, remedy, IGNORED)
        kinds = getattr(model.config.get_text_config(), "type_vocab_size", None)
        if kinds:
            remedy = "Leave token_type_ids out, or make them with the tokenizer of this model"
            _check_values(model, batch, "token_type_ids", kinds, remedy)
    length, positions = max(shard.all_lengths), learned_positions(model)
    if positions is not None and length > positions:
        raise ValueError(
            f"the batch has a token at position {length - 1}, and {type(model).__name__} has learned the "
            f"positions 0 to {positions - 1}. Cut rows or documents to {positions} tokens, or take a model with "
            "more positions."
        )
    if model.config.model_type in UNSHIFTED and shard.has_targets and shard.unshifted is None:
        raise ValueError(
            f"{type(model).__name__} compares the logits of a token with the label of that token, and the batch has "
            "shift_labels and no labels. Give labels."
        )


def _check_values(
    model: PreTrainedModel, batch: Mapping[str, Any], name: str, most: int, remedy: str, *beside: int
) -> None:
    """Refuse a tensor of the batch with values outside 0 to `most - 1` that are not in `beside` either."""
    if batch.get(name) is None:
        return
    values = on_host(batch[name])
    wrong = values[(values < 0) | (values >= most)]
    for value in beside:
        wrong = wrong[wrong != value]
    if len(wrong):
        raise ValueError(f"{name} has {int(wrong[0])}, and {type(model).__name__} takes 0 to {most - 1}. {remedy}.")


def refuse_part(module: PreTrainedModel, passed: PreTrainedModel) -> None:
    """Refuse to run a part of the model that was passed to `cp.shard`, where the batch has labels.

    The hooks of the model have not run then, so its loss would not be checked. This happens when the caller calls
    `model.forward` instead of `model`.
    """
    if any(part is module for part in passed.modules()):
        raise ValueError(
            f"{type(module).__name__} runs by itself in the block of a {type(passed).__name__} with labels, and the "
            "loss of that model would not be checked. Call it as model(**local) and not by its forward, or pass the "
            "part to cp.shard and leave the labels out."
        )


def check_inputs(
    module: torch.nn.Module, given: Mapping[str, Any], our_positions: torch.Tensor, group: CPGroup
) -> None:
    """Refuse a call of the model whose inputs would not give the result of the whole batch.

    Args:
        given: arguments of the forward of the model, by name.
        our_positions: the `position_ids` of the shard.

    Raises:
        ValueError: naming the input, and what to pass instead.
    """
    required = {"position_ids", "use_cache"}
    if given.get("labels") is not None:
        required |= {"shift_labels", "num_items_in_batch"}
    complete = all(given.get(name) is not None for name in required & set(accepted(module, required)))
    labels, targets, positions = (given.get(name) for name in ("labels", "shift_labels", "position_ids"))
    ranks = group.groups.same_batch
    # In nearly every call these are the tensors that cp.shard has made. A copy, perhaps on another device, is compared
    # by its values. That comes last, as it waits for the other ranks.
    if not complete or given.get("use_cache") or not _same(positions, our_positions, ranks):
        raise ValueError(
            "the model must be called with all that cp.shard yields: position_ids, use_cache=False, and with labels "
            "also shift_labels and num_items_in_batch. Pass the model to cp.shard and call it as model(**local), and "
            "call other models, and generate(), outside the block."
        )
    if not _same(labels, targets, ranks):
        raise ValueError(
            "labels and shift_labels differ: cp.shard yields the same shifted labels under both names, and the loss "
            "uses shift_labels. Change both alike, or change the labels of the batch before cp.shard."
        )
    check_decoder_inputs(module.config, given, group)
    kept = given.get("logits_to_keep")
    if isinstance(kept, torch.Tensor) or kept:
        raise ValueError(
            "logits_to_keep would keep the last tokens of each rank's shard, and not those of the sequence. Leave it "
            "out, and slice cp.gather(logits)."
        )


def check_decoder_inputs(config: PreTrainedConfig, given: Mapping[str, Any], group: CPGroup) -> None:
    """Refuse arguments of a decoder that would not be exact on shards.

    Args:
        config: the configuration of the decoder.
        given: its arguments by name.

    Raises:
        ValueError: naming the argument, and what to do.
    """
    for name in ENCODED:
        if given.get(name) is not None:
            raise ValueError(
                f"{name}: cross-attention to the tokens of an encoder has not been found exact on shards of the "
                "decoder. Leave it out, or run the model on whole batches, in `with cp.whole(model):`."
            )
    wanted = given.get("output_hidden_states")
    if group.config.sequence_parallel and (config.output_hidden_states if wanted is None else wanted):
        raise ValueError(
            "output_hidden_states=True: with sequence_parallel=True a layer returns a part of the tokens of the "
            "shard, which cannot be gathered. Switch one of the two off."
        )


def _same(given: torch.Tensor | None, ours: torch.Tensor | None, ranks: Ranks) -> bool:
    """Return whether a tensor has the expected values on every rank; True where either is None.

    All ranks see alike whether both are one object, so either all ranks compare values or none does.
    """
    if given is None or ours is None or given is ours:
        return True
    [differs] = gather_numbers(ranks, not torch.equal(on_host(given), on_host(ours)))
    return not any(differs)


def accepted(module: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of `names` that the forward of a module accepts."""
    parameters = inspect.signature(module.forward).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return [name for name in names if anything or name in parameters]
