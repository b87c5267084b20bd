"""Tests of the comparison of weights between the ranks of a group."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

import hf_context_parallel as hcp
from hf_context_parallel.integration.checks import weights
from tests.helpers.models import context, labelled, tiny_model
from tests.helpers.tensor_parallel import saved, tensor_parallel_model


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


def messages_of_changed_weights(changes: list[tuple[int, str, int, float]]) -> list[str]:
    """Outcomes for a new model, and for one that was computed before, with changed elements on one rank.

    Args:
        changes: the rank or -1 for all, a parameter, the number of an element, and its value.
    """
    cp, outcomes = context(), []
    for before in (False, True):
        model = tiny_model("llama", "context_parallel", torch.float32)
        if before:
            with cp.shard(labelled(), model):
                pass
        for rank, name, place, value in changes:
            if rank in (dist.get_rank(), -1):
                model.get_parameter(name).data.view(-1)[place] = value
        try:
            with cp.shard(labelled(), model):
                outcomes.append("entered")
        except ValueError as refusal:
            outcomes.append(str(refusal))
    return outcomes


HEAD, NORM = "lm_head.weight", "model.norm.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_on_all_ranks(on_ranks, value):
    one = on_ranks(2, messages_of_changed_weights, [(1, HEAD, -1, value), (1, HEAD, -2, value)])
    assert one[0] == one[1]
    for message in one[0]:
        assert message.startswith(f"{HEAD} (2 elements on rank 1) holds NaN or infinite weights")
    both = on_ranks(2, messages_of_changed_weights, [(-1, HEAD, -1, value), (-1, NORM, -1, value)])
    assert both[0] == both[1]
    for message in both[0]:
        assert "lm_head.weight (1 of its" in message and "model.norm.weight (1 of its" in message
        assert "different weights" not in message


@pytest.mark.parametrize(("name", "place"), [(HEAD, 0), ("model.layers.0.mlp.up_proj.weight", 5)])
def test_all_elements_are_compared_once(on_ranks, name, place):
    """No sample has the first elements of a parameter."""
    messages = on_ranks(2, messages_of_changed_weights, [(1, name, place, 3.0)])
    assert messages[0] == messages[1]
    first, later = messages[0]
    assert first.startswith(f"the ranks of the group have different weights: {name}[0, {place}] is ")
    assert "and 3 on rank 1" in first and later == "entered"
    messages = on_ranks(2, messages_of_changed_weights, [(1, name, place, float("nan"))])
    assert all(first.startswith(f"{name} (1 elements on rank 1) holds NaN") for first, _ in messages)


def sums_of(kind: str) -> tuple[list[int], list[bool]]:
    """Checksums of a weight, of the same one in other strides, and with two rows swapped."""
    weight = torch.randn(9, 1031, generator=torch.Generator().manual_seed(0))
    dtypes = {"int8": torch.uint8, "float8": torch.float8_e4m3fn}
    weight = weight.to(dtypes.get(kind) or getattr(torch, kind))
    swapped = weight.clone()
    swapped[[2, 5]] = weight.clone()[[5, 2]]
    made = [torch.nn.Parameter(x, requires_grad=False) for x in (weight, weight.clone(), swapped)]
    found = [weights._checksum(x, torch.device("cpu")) for x in made]
    return [int(total) for total, _ in found], [bool(broken) for _, broken in found]


@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "float8", "int8"])
def test_checksums_see_the_order_of_rows(kind, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", 4096)
    (first, same, swapped), broken = sums_of(kind)
    assert first == same != swapped and not any(broken)


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


def messages_of_sharded_weights(folder, change: tuple[int, float] | None, **sizes) -> list[str]:
    """Outcomes of two batches for a model that Transformers has sharded.

    Args:
        change: before each batch, a rank and the value of the first or the last element of its shard of `SHARDED`.
    """
    model = tensor_parallel_model(folder, dtype=torch.float32, **(sizes or BOTH))
    cp, outcomes = hcp.ContextParallel(hcp.ContextParallelConfig(size=2), hcp.mesh_of(model)), []
    for element in (0, -1):
        if change is not None and change[0] == dist.get_rank():
            model.get_parameter(SHARDED).data.to_local().view(-1)[element] = change[1]
        try:
            with cp.shard(labelled(2, 24), model):
                outcomes.append("entered")
        except ValueError as refusal:
            outcomes.append(str(refusal))
    return outcomes


BOTH = {"tp_size": 2, "dp_replicate_size": 2}
SHARDED = "model.layers.0.self_attn.q_proj.weight"


def test_shards_of_tensor_parallelism_are_compared(on_ranks, tmp_path):
    """Ranks 0 and 2 hold one half of a weight, and ranks 1 and 3 the other."""
    folder = saved(tmp_path, "llama")
    assert on_ranks(4, messages_of_sharded_weights, folder, None) == [["entered"] * 2] * 4
    for value, said in (
        (3.0, f"{SHARDED}[0, 0] of its shard is "),
        (float("nan"), f"{SHARDED} (1 elements on rank 1)"),
    ):
        found = on_ranks(4, messages_of_sharded_weights, folder, (3, value))
        assert all(messages == found[0] for messages in found)
        assert said in found[0][0]
        assert all("and 3 on rank 1" in message or "holds NaN" in message for message in found[0])


def test_shards_of_fsdp_are_finite(on_ranks, tmp_path):
    folder = saved(tmp_path, "llama")
    for value in (3.0, float("nan")):  # no two ranks hold the same part
        found = on_ranks(2, of_fsdp, folder, (1, value))
        assert found[0] == found[1]
        said = [message.startswith(f"{SHARDED} (") and "holds NaN" in message for message in found[0]]
        assert said == [math.isnan(value)] * 2


def of_fsdp(folder, change: tuple[int, float]) -> list[str]:
    return messages_of_sharded_weights(folder, change, fsdp_size=2)
