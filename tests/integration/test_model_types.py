"""Models of every supported type on shards, against the same model on one process: loss, logits, every gradient."""

from __future__ import annotations

import pytest
import torch

from hf_context_parallel.integration.active_batch import active_batch
from hf_context_parallel.verification.types import check as checks
from hf_context_parallel.verification.types.tiny import tiny_config
from tests.helpers.layouts import finely_dealt
from tests.helpers.models import context, document_positions, error, reduced, some_labels, tiny_model, tokens

EXACT = ("gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe")
LIKE_LLAMA = ("granite", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
"""Types that make test-all runs alone, as their attention is that of Llama but for its projections and norms."""


def dense():
    input_ids = tokens(2, 37)
    return {"input_ids": input_ids, "labels": some_labels(input_ids)}


def one_rank_without_targets():
    input_ids = tokens(1, 32)
    labels = input_ids.clone()
    labels[:, 5:] = -100  # the targets are all in the first chunk
    return {"input_ids": input_ids, "labels": labels}


def packed():
    positions = document_positions(11, 1, 2, 20, 7)
    input_ids = tokens(1, positions.shape[1])
    return {"input_ids": input_ids, "labels": some_labels(input_ids), "position_ids": positions}


def padded(side: str):
    input_ids = tokens(3, 29)
    mask = torch.ones_like(input_ids)
    for row, padding in ((0, 9), (1, 24)):
        mask[row, :padding] = 0
    if side == "right":
        mask = mask.flip(1)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def padded_inside():
    input_ids = tokens(2, 31)
    mask = torch.ones_like(input_ids)
    mask[0, 4:7] = mask[1, 12] = mask[1, 15:20] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


BATCHES = {
    "dense": dense(),
    "one rank without targets": one_rank_without_targets(),
    "packed": packed(),
    "padded on the left": padded("left"),
    "padded on the right": padded("right"),
    "padded inside": padded_inside(),
    "fewer tokens than ranks": {"input_ids": tokens(1, 3), "labels": tokens(1, 3)},
}


def errors_of_a_model(model_type: str, names: list[str], options: dict) -> dict[str, tuple[float, float, float]]:
    """Compute, for each batch, the errors of loss, logits and gradients, relative to the largest entry of a tensor."""
    cp = context(**options)
    whole, sharded = tiny_model(model_type, None), tiny_model(model_type, "context_parallel")
    errors = {}
    for name in names:
        batch = BATCHES[name]
        whole.zero_grad()
        sharded.zero_grad()
        expected = whole(**batch, use_cache=False)
        expected.loss.backward()
        with cp.shard(batch, sharded) as local:
            found = sharded(**local)
            found.loss.backward()
            logits = cp.gather(found.logits)
        assert not found.loss.isnan()
        loss = reduced(found.loss)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        gradients = [
            error(reduced(torch.zeros_like(a) if a.grad is None else a.grad), b.grad)
            for a, b in zip(sharded.parameters(), whole.parameters())
        ]
        errors[name] = error(loss, expected.loss), error(logits[real], expected.logits[real]), max(gradients)
    return errors


def check(results) -> None:
    for errors in results:
        for name, (loss, logits, gradients) in errors.items():
            assert loss < 1e-6, (name, loss)
            assert logits < 1e-7, (name, logits)
            assert gradients < 1e-7, (name, gradients)


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in LIKE_LLAMA)) for name in EXACT]
)
def test_every_supported_type_is_exact_on_three_ranks(on_ranks, model_type):
    check(on_ranks(3, errors_of_a_model, model_type, list(BATCHES), {}))


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ("zigzag", 1),
        pytest.param("zigzag", 2, marks=pytest.mark.exhaustive),
        ("zigzag", 4),
        pytest.param("contiguous", 1, marks=pytest.mark.exhaustive),
        ("contiguous", 2),
        pytest.param("contiguous", 4, marks=pytest.mark.exhaustive),
    ],
)
def test_other_group_sizes_and_layouts_are_exact(on_ranks, ranks, layout):
    check(on_ranks(ranks, errors_of_a_model, "qwen3", list(BATCHES), {"layout": layout}))


def errors_of_a_balanced_model(model_type: str, layout: str) -> tuple[dict, bool]:
    """Compute errors with the smallest chunks, and whether any batch had another layout than zigzag."""
    with finely_dealt() as dealt:
        found, _ = checks.errors(tiny_config(model_type), {"layout": layout})
    return found, any(len(layout.chunk_owners) > 2 * layout.size for layout in dealt)


@pytest.mark.parametrize(
    ("model_type", "layout"), [("gpt_oss", "auto"), ("qwen3_next", "balanced"), ("bloom", "balanced")]
)
def test_a_balanced_layout_is_exact(on_ranks, model_type, layout):
    """The balanced layout is exact with windows, with convolutions and scans, and on whole sequences."""
    for found, otherwise in on_ranks(3, errors_of_a_balanced_model, model_type, layout):
        assert otherwise
        assert all(max(of_kind.loss, of_kind.gradients) < 1e-9 for of_kind in found.values()), found


@pytest.mark.parametrize(
    ("ranks", "comm_type"),
    [
        (2, "a2a"),
        (3, "all_gather"),
        (4, "a2a+p2p"),
        (2, "auto"),
        (2, ["a2a", "all_gather"]),
        (2, {"full_attention": "a2a", "sliding_attention": "p2p"}),
    ],
    ids=str,
)
def test_other_ways_to_communicate_are_exact(on_ranks, ranks, comm_type):
    """The model has windows in every other layer, sinks, and fewer key heads than query heads."""
    for found, _ in on_ranks(ranks, checks.errors, tiny_config("gpt_oss"), {"comm_type": comm_type}):
        assert all(max(of_kind.loss, of_kind.gradients) < 1e-9 for of_kind in found.values()), found


def strategies_of_layers(comm_type) -> list[str]:
    model = tiny_model("gpt_oss", "context_parallel")
    cp = context(comm_type=comm_type)
    with cp.shard(BATCHES["dense"], model) as local:
        model(**local)
        return [strategy.comm_type for strategy in active_batch().strategies.values()]


def test_every_layer_communicates_as_it_is_told(on_ranks):
    assert on_ranks(2, strategies_of_layers, ["a2a", "all_gather"]) == [["a2a", "all_gather"]] * 2
    by_type = {"full_attention": "all_gather", "sliding_attention": "p2p"}
    assert on_ranks(2, strategies_of_layers, by_type) == [["p2p", "all_gather"]] * 2


def message(comm_type, **options) -> str:
    model = tiny_model("gpt_oss", "context_parallel")
    try:
        with context(comm_type=comm_type, **options).shard(BATCHES["dense"], model) as local:
            model(**local)
    except ValueError as error:
        return str(error)
    return "no error"


def test_what_does_not_fit_a_model_is_refused_on_all_ranks(on_ranks):
    for comm_type, part in (
        (["a2a"] * 3, "comm_type lists 3 entries, but the model has 2 layers"),
        ({"sliding_attention": "p2p"}, "comm_type names sliding_attention, but the model has a full_attention layer"),
    ):
        assert all(part in text for text in on_ranks(2, message, comm_type))
