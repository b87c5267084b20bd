"""Tests of refusals that all ranks raise, where only some hold what is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers.models import context, labelled, tiny_model


def message_of(case: str) -> str:
    """Return the error of this rank for a batch that only some ranks would fail on."""
    cp, batch, kind = context(), labelled(), "llama"
    if case == "a block":
        kind = "gemma3"
        batch["token_type_ids"] = torch.zeros(2, 19, dtype=torch.long)
        batch["token_type_ids"][:, 12:15] = 1  # of the second rank alone
    elif case == "a token":
        batch["input_ids"][1, 17] = 4096
    elif case == "a label":
        batch["labels"][0, 18] = -1
    elif case == "a type":
        kind = "bert"
        batch["token_type_ids"] = torch.zeros(2, 19, dtype=torch.long)
        batch["token_type_ids"][0, 17] = 20
    elif case == "a position":
        kind = "gpt2"
        batch = labelled(1, 4096)
    model = tiny_model(kind, "context_parallel")
    if case == "a mode":
        model.train(dist.get_rank() == 0)
    try:
        with cp.shard(batch, model) as local:
            if case in ("changed positions", "changed labels"):
                name = {"changed positions": "position_ids", "changed labels": "labels"}[case]
                local[name] = local[name].where(local["position_ids"] != 0, 5)  # of the first rank's tokens alone
            model(**local)
    except ValueError as refusal:
        return str(refusal)
    return "nothing"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a block", "'gemma3_text' masks attention by 'blockwise_overlay"),
        ("a token", "rank 0 of the group: input_ids has 4096, and LlamaForCausalLM takes 0 to"),
        ("a label", "rank 0 of the group: labels has -1, and LlamaForCausalLM takes 0 to"),
        ("a type", "rank 0 of the group: token_type_ids has 20, and BertLMHeadModel takes 0 to"),
        ("changed positions", "the model must be called with all that cp.shard yields: position_ids"),
        ("changed labels", "labels and shift_labels differ"),
        ("a position", "rank 0 of the group: the batch has a token at position 4095, and GPT2LMHeadModel has learned"),
        ("a mode", "ranks 0 and 1 of the group have different batches or models"),
    ],
)
def test_what_one_rank_would_fail_on_all_refuse(on_ranks, case, message):
    assert [text.startswith(message) for text in on_ranks(2, message_of, case)] == [True, True]


class Broken(dict):
    def items(self):
        raise TypeError("no such thing")


def message_of_another_error() -> str:
    try:
        with context().shard(labelled() if dist.get_rank() else Broken()):
            return "nothing"
    except ValueError as refusal:
        return str(refusal)


def test_other_errors_arrive_with_their_type(on_ranks):
    assert on_ranks(2, message_of_another_error) == ["rank 0 of the group: TypeError: no such thing"] * 2
