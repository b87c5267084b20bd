"""Tests of agreement before a batch runs: all ranks go on, or all raise the same error."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import hf_context_parallel as hcp
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


def steps_of_a_loop(summed: bool, check_batch: bool) -> list[str]:
    """Outcomes of three steps of a loop that sums gradients over the ranks, or forgets to."""
    cp, model = context(check_batch=check_batch), tiny_model("llama", "context_parallel", torch.float32)
    optimizer, outcomes = torch.optim.AdamW(model.parameters()), []
    for seed in range(3):
        try:
            with cp.shard(labelled(2, 19, seed), model) as local:
                model(**local).loss.backward()
        except ValueError as refusal:
            outcomes.append(str(refusal))
            continue
        for parameter in model.parameters():
            if summed:
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        outcomes.append("done")
    return outcomes


def test_weights_that_drift_apart_are_refused(on_ranks):
    done, refused = "done", "the ranks of the group have different weights"
    assert on_ranks(3, steps_of_a_loop, True, True) == [[done] * 3] * 3
    assert on_ranks(3, steps_of_a_loop, False, False) == [[done] * 3] * 3
    for first, *others in on_ranks(3, steps_of_a_loop, False, True):
        assert first == done
        assert all(message.startswith(refused) and "reduce gradients" in message for message in others)


def message_of_rounding(units: int) -> str:
    """Outcome for a model whose weights differ between ranks by `units` of rounding of the largest weight."""
    cp, model = context(), tiny_model("llama", "context_parallel", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += units * dist.get_rank() * torch.finfo(torch.float32).eps * parameter.abs().max()
    try:
        with cp.shard(labelled(), model):
            return "entered"
    except ValueError as refusal:
        return str(refusal)


def test_weights_may_be_apart_by_rounding(on_ranks):
    assert on_ranks(2, message_of_rounding, 2) == ["entered", "entered"]
    for message in on_ranks(2, message_of_rounding, 200):
        assert message.startswith("the ranks of the group have different weights")


def message_of_weights(trained: list[str], drawn: list[str]) -> str:
    """Outcome for a model whose `drawn` parameters differ between ranks, and whose `trained` ones are trained."""
    cp, model = context(), tiny_model("llama", "context_parallel")
    generator = torch.Generator().manual_seed(dist.get_rank())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
        if any(part in name for part in drawn):
            torch.nn.init.normal_(parameter, generator=generator)
    try:
        with cp.shard(labelled(), model):
            return "entered"
    except ValueError as refusal:
        return str(refusal)


@pytest.mark.parametrize(
    ("trained", "drawn"), [([""], ["proj"]), ([], ["proj"]), (["norm"], ["model.norm"])], ids=["all", "none", "few"]
)
def test_models_of_other_seeds_are_refused(on_ranks, trained, drawn):
    for message in on_ranks(2, message_of_weights, trained, drawn):
        assert message.startswith("the ranks of the group have different weights")
    assert on_ranks(2, message_of_weights, trained, []) == ["entered", "entered"]


def message_of_a_bad_size(sizes: list[int]) -> str:
    try:
        hcp.ContextParallel(hcp.ContextParallelConfig(size=sizes[dist.get_rank()]))
    except ValueError as refusal:
        return str(refusal)


def test_a_size_that_does_not_divide_the_world_is_refused(on_ranks):
    for message in on_ranks(3, message_of_a_bad_size, [2, 2, 2]):
        assert "size=2 does not divide the world size, which is 3" in message


def test_ranks_that_ask_for_different_sizes_are_told(on_ranks):
    messages = on_ranks(4, message_of_a_bad_size, [2, 2, 4, 4])
    assert len(set(messages)) == 1 and "rank 0 asks for CP groups of size=2 and rank 2 for size=4" in messages[0]


def test_a_group_without_torch_distributed_says_what_to_start():
    with pytest.raises(ValueError, match="accelerate launch"):
        hcp.ContextParallel(hcp.ContextParallelConfig(size=2))


def test_a_kernel_that_is_missing_is_told_at_once():
    with pytest.raises(ValueError, match="kernel='torch' cannot be used: PyTorch sees no CUDA device"):
        context(kernel="torch")
