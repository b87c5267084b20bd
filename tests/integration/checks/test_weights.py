"""Tests of the comparison of weights between the ranks of a group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers.models import context, labelled, tiny_model


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


def message_of_broken_weights(rank: int, value: float) -> str:
    """Outcome for a model whose head is `value` on one rank, or on all for the rank -1."""
    cp, model = context(), tiny_model("llama", "context_parallel", torch.float32)
    if rank in (dist.get_rank(), -1):
        torch.nn.init.constant_(model.lm_head.weight, value)
    try:
        with cp.shard(labelled(), model):
            return "entered"
    except ValueError as refusal:
        return str(refusal)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_broken_on_one_rank_are_refused(on_ranks, value):
    for message in on_ranks(2, message_of_broken_weights, 1, value):
        assert message.startswith("the ranks of the group have different weights")
    assert on_ranks(2, message_of_broken_weights, -1, value) == ["entered"] * 2


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
