"""Tests of agreement before a batch runs: all ranks go on, or all raise the same error."""

from __future__ import annotations

import traceback

import pytest
import torch
import torch.distributed as dist

from hf_context_parallel.distributed.agreement import agreement_of, collective
from hf_context_parallel.distributed.mesh import ranks_of, world
from tests.helpers.models import context, document_positions, label_at_padding, labelled, tiny_model, tokens


def messages_when_ranks_disagree(case: str) -> str:
    cp, batch, model = context(check_batch="unchecked" not in case), labelled(), None
    rank = dist.get_rank()
    if case == "unchecked documents differ":
        batch = {"input_ids": tokens(1, 12), "position_ids": document_positions(5 + rank, 7 - rank)}
    if case == "one rank's batch is no batch" and rank == 2:
        batch = {"input_ids": batch["input_ids"].tolist()}
    if case == "one rank's dtype differs":
        model = tiny_model("llama", "context_parallel", torch.float32 if rank == 1 else torch.float64)
    if case == "one rank's batch is bad" and rank == 1:
        batch = label_at_padding()
    if case == "one rank's model is bad" and rank == 2:
        model = tiny_model("llama", "sdpa")
    if case in ("batches differ", "unchecked") and rank == 2:
        batch["input_ids"][0, 0] += 1
    if case == "one rank has no labels" and rank == 1:
        del batch["labels"]
    if case == "lengths differ" and rank == 0:
        batch = labelled(2, 18)
    try:
        with cp.shard(batch, model):
            return "entered"
    except ValueError as refusal:
        return str(refusal)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("one rank's batch is bad", "rank 1 of the group: row 1 has a label"),
        ("one rank's model is bad", "rank 2 of the group: LlamaForCausalLM was loaded with"),
        (
            "batches differ",
            "ranks 0 and 2 of the group have different batches or models: input_ids[0, 0] is ",
        ),
        (
            "lengths differ",
            "ranks 0 and 1, 2 of the group have different batches or models: input_ids is of shape (2, 18) on rank 0 "
            "and (2, 19) on rank 1",
        ),
        ("unchecked", "entered"),
        (
            "unchecked documents differ",
            "ranks 0 and 1, 2 of the group have different batches or models: position_ids[0, 5] is 0 on rank 0 and 5 "
            "on rank 1",
        ),
        ("one rank's batch is no batch", "rank 2 of the group: input_ids is a list"),
        (
            "one rank's dtype differs",
            "ranks 0 and 1 of the group have different batches or models: the dtype of the model is 'torch.float64' "
            "on rank 0 and 'torch.float32' on rank 1; ",
        ),
        ("one rank has no labels", "ranks 0 and 1 of the group have different batches or models: labels is given on"),
    ],
)
def test_all_ranks_refuse_alike(on_ranks, case, expected):
    messages = on_ranks(3, messages_when_ranks_disagree, case)
    assert len(set(messages)) == 1
    assert messages[0].startswith(expected)


def errors_of_nested_groups(error: str) -> tuple[str, bool, bool, int]:
    """Raise on the last rank in a group of two within the world, and return what this rank knows of the error."""
    kind = {"refusal": ValueError, "bug": KeyError}[error]
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = ranks_of(pairs[dist.get_rank() // 2])
    try:
        with collective(world()), collective(pair):
            if dist.get_rank() == 3:
                refuse(kind)
    except ValueError as caught:
        agreement = agreement_of(caught)
        trace = traceback.format_exception(caught)
        return str(caught), agreement.tells, agreement.expected, sum("Traceback" in line for line in trace)
    raise AssertionError("nothing was raised")


def refuse(kind: type[Exception]) -> None:
    raise kind("no such thing")


@pytest.mark.parametrize(("error", "message"), [("refusal", "no such thing"), ("bug", "KeyError: 'no such thing'")])
def test_an_agreed_error_keeps_its_text_and_is_told_by_one_rank(on_ranks, error, message):
    found = on_ranks(4, errors_of_nested_groups, error)
    assert {text for text, *_ in found} == {f"rank 1 of the group: {message}"}
    assert [tells for _, tells, _, _ in found] == [False, False, False, True]
    assert [traces for *_, traces in found] == [1] * 4
