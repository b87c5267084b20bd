"""Embeddings and features of media that no rank makes whole, and what happens to models that use them otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

import hf_context_parallel as hcp
from hf_context_parallel.compat import tree_leaves
from hf_context_parallel.integration.border.deferred_embeddings import DeferredEmbeddings
from hf_context_parallel.integration.deferred import made
from hf_context_parallel.integration.switches import allow_unchecked_models
from hf_context_parallel.verification.types import tiny
from hf_context_parallel.verification.types.check import unrounded
from tests.helpers.border import mean_gradients
from tests.helpers.models import context, tiny_model, tokens
from tests.helpers.towers import batch_of, drawn, multimodal

WIDTH = 32
"""Width of the tiny models."""


def models(model_type: str = "qwen3_vl", prepare: Callable = lambda model: model) -> tuple[Any, Any]:
    """Make a model for one process, and the same model, prepared for the ranks."""
    whole, sharded = (multimodal(model_type, name).train() for name in (None, "context_parallel"))
    with allow_unchecked_models():
        sharded = hcp.parallelize(prepare(sharded), context())
    return whole, sharded


def errors(whole: Any, sharded: Any, batch: dict[str, torch.Tensor], averaged: bool = False) -> float:
    """Compare losses and gradients after a trial, relative to the largest entry of each tensor."""
    sharded(**batch)
    with unrounded(whole.config):
        expected, found = whole(**batch).loss, sharded(**batch).loss
        expected.backward()
        found.backward()
    grads = [x.grad for x in sharded.parameters()] if averaged else mean_gradients(sharded)
    grads = [x.full_tensor() if isinstance(x, DTensor) else x for x in grads]
    worst = abs(found.item() / expected.item() - 1)
    for mine, theirs in zip(grads, (x.grad for x in whole.parameters()), strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            worst = max(worst, float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-4)))
    return worst


# What a rank holds


class Largest(TorchDispatchMode):
    """Mode that notes the most vectors of the width of the model that a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 1 and x.shape[-1] == WIDTH:
                is_view = x._is_view() and 0 in x.stride()
                self.vectors = max(self.vectors, 0 if is_view else x.numel() // WIDTH)
        return result


def vectors_of_rank() -> tuple[int, int]:
    """Return the most vectors that a tensor holds in a step, and the tokens of the batch.

    The tower is narrower. Weights are smaller than a share of the tokens.
    """
    config = multimodal("qwen3_vl", None).config
    config.vision_config.hidden_size = WIDTH // 2
    model = tiny.tiny_model(config, "context_parallel", auto=AutoModelForImageTextToText).train()
    with allow_unchecked_models():
        hcp.parallelize(model, context())
    batch = {name: torch.cat([x] * 4) for name, x in batch_of("qwen3_vl", 8).items()}
    model(**batch)  # a trial
    with Largest() as largest:
        model(**batch).loss.backward()
    return largest.vectors, batch["input_ids"].numel()


def test_no_rank_holds_whole_embeddings_or_features(on_ranks):
    for vectors, count in on_ranks(4, vectors_of_rank):
        assert count / 4 <= vectors < count / 2, (vectors, count)  # images are not dealt evenly


# Ways in which models are prepared


def sharded_by_fsdp(model: torch.nn.Module) -> torch.nn.Module:
    """Shard a model, and its embeddings by themselves."""
    for part in (*model.model.language_model.layers, model.model.visual, model.get_input_embeddings()):
        fully_shard(part)
    return fully_shard(model)


def fsdp_errors() -> float:
    return errors(*models(prepare=sharded_by_fsdp), batch_of("qwen3_vl", 3), averaged=True)


def test_embeddings_that_fsdp_shards(on_ranks):
    assert max(on_ranks(2, fsdp_errors)) < 1e-7


def hooked_errors() -> float:
    """Compare models whose embeddings a hook changes by the place of a token in its row."""
    whole, sharded = models()
    for model in (whole, sharded):
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, x: x * torch.arange(1, x.shape[1] + 1)[:, None])
    return errors(whole, sharded, batch_of("qwen3_vl", 3))


def test_embeddings_with_hooks_are_made_whole(on_ranks):
    assert max(on_ranks(2, hooked_errors)) < 1e-7


# Uses of what is deferred


def write_to(x: Any) -> Any:
    x[:, 1:3] = 0.5
    return x


def write_within(x: Any) -> Any:
    x.mul_(2)
    return x


USES: dict[str, Callable[[Any], Any]] = {
    "cast": lambda x: x.to(torch.float64).contiguous(),
    "scaled": lambda x: x * 3,
    "scaled from the left": lambda x: 3 * x,
    "filled": lambda x: x.masked_fill(torch.arange(x.shape[1])[None, :, None] % 3 == 0, 0.5),
    "added": lambda x: x + 1,
    "compared": lambda x: torch.where((x > 0)[..., :1], x, -x),
    "written to": write_to,
    "written within": write_within,
    "cut": lambda x: torch.cat([x[:, :2], x[:, 2:]], dim=1),
    "counted": lambda x: x * x[torch.ones(x.shape[:2], dtype=torch.bool)].numel(),
}


def errors_of_use(use: str) -> float:
    """Compare models that do something with embeddings, before features are put in, and with features."""
    whole, sharded = models()
    function = USES[use]
    for model in (whole, sharded):
        inner = model.model
        stock, mask = inner.get_image_features, inner.get_placeholder_mask
        embed = inner.get_input_embeddings

        def features(*args: Any, stock: Callable = stock, **kwargs: Any) -> Any:
            output = stock(*args, **kwargs)
            output.pooler_output = [function(torch.cat(list(output.pooler_output), 0)[None])[0]]
            return output

        inner.get_image_features, inner.get_placeholder_mask = features, mask
        inner.get_input_embeddings = lambda embed=embed: lambda ids: function(embed()(ids))
    return errors(whole, sharded, batch_of("qwen3_vl", 4))


def each_image_by_itself(*args: Any, model: Any, ids: torch.Tensor, x: Any, pieces: Any) -> Any:
    """Put the features of each image in by a `masked_scatter` of its own."""
    places = (ids == model.config.image_token_id).flatten().nonzero()[:, 0].split([len(piece) for piece in pieces])
    for piece, own in zip(pieces, places):
        mask = torch.zeros(ids.numel(), dtype=torch.bool).index_fill(0, own, True).view(*ids.shape, 1)
        x = x.masked_scatter(mask, piece)
    return x


def errors_by_image() -> float:
    """Compare models that put features in image by image, after zeros that their forward puts in."""
    whole, sharded = models()
    batch = batch_of("qwen3_vl", 4)
    for model in (whole, sharded):
        decoder, encode, pieces = model.model.language_model, model.model.get_image_features, []

        def features(*args: Any, encode: Callable = encode, pieces: list = pieces, **kwargs: Any) -> Any:
            output = encode(*args, **kwargs)
            pieces[:] = output.pooler_output
            return type(output)(
                pooler_output=[torch.zeros(x.shape, dtype=x.dtype) for x in pieces],
                deepstack_features=output.deepstack_features,
            )

        def forward(*args: Any, decoder: Any = decoder, stock: Any = decoder.forward, pieces: list = pieces, **given):
            x = given["inputs_embeds"]
            given["inputs_embeds"] = each_image_by_itself(model=whole, ids=batch["input_ids"], x=x, pieces=pieces)
            return stock(*args, **given)

        model.model.get_image_features, decoder.forward = features, forward
    return errors(whole, sharded, batch)


def test_features_of_single_images(on_ranks):
    assert max(on_ranks(2, errors_by_image)) < 1e-7


class ByPlace(torch.nn.Embedding):
    """Embedding that depends on the place of a token in its row."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * torch.arange(1, ids.shape[1] + 1).sqrt()[:, None].to(self.weight)


def errors_of_embeddings_by_place(media: bool) -> float:
    """Compare models with such embeddings."""
    if media:
        whole, sharded = (multimodal("qwen3_vl", name).train() for name in (None, "context_parallel"))
        batch = batch_of("qwen3_vl", 3)
    else:
        whole, sharded = (tiny_model("llama", name).train() for name in (None, "context_parallel"))
        ids = tokens(2, 21)
        batch = {"input_ids": ids, "labels": ids}
    for model in (whole, sharded):
        stock = model.get_input_embeddings()
        own = ByPlace(*stock.weight.shape, dtype=stock.weight.dtype)
        own.weight = stock.weight
        model.set_input_embeddings(own)
    with allow_unchecked_models():
        hcp.parallelize(sharded, context())
    return errors(whole, sharded, batch)


@pytest.mark.parametrize("media", [True, False])
def test_embeddings_that_depend_on_the_row_are_made_whole(on_ranks, media):
    assert max(on_ranks(2, errors_of_embeddings_by_place, media)) < 1e-7


def message_of_an_unknown_id() -> str:
    """Give a model an id outside of its vocabulary, which one rank holds, and then a right batch."""
    _, sharded = models()
    batch = batch_of("qwen3_vl", 3)
    wrong = {**batch, "input_ids": batch["input_ids"].clone()}
    wrong["input_ids"][0, -1] = 10**6
    with pytest.raises(ValueError) as caught:
        sharded(**wrong)
    assert sharded(**batch).loss.isfinite()
    return str(caught.value)


def test_an_unknown_id_is_refused_on_all_ranks(on_ranks):
    first, second = on_ranks(2, message_of_an_unknown_id)
    assert first == second and "input_ids has 1000000" in first


@pytest.mark.parametrize("use", USES)
def test_any_use_gives_what_tensors_give(on_ranks, use):
    assert max(on_ranks(2, errors_of_use, use)) < 1e-7


def test_deferred_embeddings_answer_like_tensors():
    ids = torch.tensor([[1, 2, 3, 4]])
    table = drawn(6, 8)
    deferred = DeferredEmbeddings(lambda ids: table[ids], ids, table[ids[:, :1]])
    assert (deferred.shape, deferred.ndim, deferred.size(-1), len(deferred)) == (torch.Size((1, 4, 8)), 3, 8, 1)
    assert deferred.numel() == 32 and deferred.dtype == torch.float64 and deferred.device.type == "cpu"
    assert deferred.to(torch.float64).contiguous() is deferred  # so that what is written to one is written to both
    half = deferred.to(torch.float32) * 2
    mask = ids > 2
    assert deferred[mask[..., None].expand_as(deferred)].numel() == 16
    filled = half.masked_fill((ids == 1)[..., None].expand_as(half), 0.0)
    assert not half.is_made and torch.equal(filled.whole[:, 1:], half.whole[:, 1:]) and not filled.whole[:, 0].any()
    half = deferred.to(torch.float32) * 2
    assert deferred[mask].numel() == 16 and deferred[mask].shape == (2, 8) and not deferred.is_made
    placed = half.masked_scatter(mask[..., None], torch.ones(2, 8))
    assert placed.dtype == torch.float32 and not half.is_made
    expected = (table[ids].float() * 2).masked_scatter(mask[..., None], torch.ones(2, 8))
    assert torch.equal(made([placed])[0], expected)
    assert placed.is_made and torch.equal(placed + 1, expected + 1)
    assert torch.equal(abs(half) // 2, half.whole.abs() // 2)
    assert table.to(deferred) is table and not deferred.is_made
    assert deferred.whole is deferred.whole and not deferred._changed().is_made
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(deferred)
    with pytest.raises(AttributeError, match="missing"):
        placed.missing  # noqa: B018
