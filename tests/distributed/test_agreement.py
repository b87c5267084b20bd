"""Tests of agreement before a batch runs: all ranks go on, or all raise the same error."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

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
        ("batches differ", "ranks 0 and 2 of the group have different batches"),
        ("lengths differ", "ranks 0 and 1 of the group have different batches"),
        ("unchecked", "entered"),
        ("unchecked documents differ", "ranks 0 and 1 of the group have different batches"),
        ("one rank's batch is no batch", "rank 2 of the group: input_ids is a list"),
        ("one rank's dtype differs", "ranks 0 and 1 of the group have different batches or models"),
    ],
)
def test_all_ranks_refuse_alike(on_ranks, case, expected):
    messages = on_ranks(3, messages_when_ranks_disagree, case)
    assert len(set(messages)) == 1
    assert messages[0].startswith(expected)
