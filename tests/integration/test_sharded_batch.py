"""Tests of `cp.shard` and `cp.gather`, and of their refusals, on real process groups."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.models import context, error, labelled, reduced, tiny_model

# Batches of all kinds


def inputs_of_a_shard() -> dict:
    cp = context()
    batch = {**labelled(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with cp.shard(batch) as local:
        return local


def test_a_shard_has_what_the_model_needs_and_is_padded_inside(on_ranks):
    batch = labelled(2, 10)
    shards = on_ranks(2, inputs_of_a_shard)
    for local in shards:
        assert set(local) == {
            "input_ids",
            "labels",
            "shift_labels",
            "position_ids",
            "use_cache",
            "num_items_in_batch",
        }
        assert local["use_cache"] is False
        assert local["num_items_in_batch"] == (batch["labels"][:, 1:] != -100).sum()
        assert local["shift_labels"].is_contiguous()
        assert local["input_ids"].shape == (2, 6)  # 12 in all, of which 2 are padding
    first, second = (local["position_ids"][0].tolist() for local in shards)
    assert (first, second) == ([0, 1, 2, 9, 0, 0], [3, 4, 5, 6, 7, 8])
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(shards[1]["shift_labels"], shifted[:, 3:9])
    torch.testing.assert_close(shards[0]["shift_labels"][:, :4], shifted[:, [0, 1, 2, 9]])
    assert (shards[0]["shift_labels"][:, 4:] == -100).all()


def embedded_errors() -> tuple[float, float]:
    """Compute the errors of loss and input gradients of a batch with `inputs_embeds`."""
    cp, batch = context(), labelled()
    whole, sharded = tiny_model("llama", None), tiny_model("llama", "context_parallel")
    embeds = [model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_() for model in (whole, sharded)]
    expected = whole(inputs_embeds=embeds[0], labels=batch["labels"], use_cache=False).loss
    expected.backward()
    with cp.shard({"input_ids": None, "inputs_embeds": embeds[1], "labels": batch["labels"]}, sharded) as local:
        loss = sharded(**local).loss
        loss.backward()
    return error(reduced(loss), expected), error(reduced(embeds[1].grad), embeds[0].grad)


def test_embeddings_can_be_sharded_and_get_their_gradients(on_ranks):
    for loss, gradient in on_ranks(3, embedded_errors):
        assert loss < 1e-6 and gradient < 1e-7


# Wrapped models, and blocks inside blocks


def ddp_errors() -> float:
    """DDP takes the mean of gradients: a loss times the number of ranks gives the sum of them."""
    cp, batch = context(), labelled()
    whole, sharded = tiny_model("qwen2", None), DistributedDataParallel(tiny_model("qwen2", "context_parallel"))
    whole(**batch, use_cache=False).loss.backward()
    with cp.shard(batch, sharded) as local:
        (sharded(**local).loss * cp.size).backward()
    return max(error(a.grad, b.grad) for a, b in zip(sharded.parameters(), whole.parameters()))


def test_a_model_wrapped_by_ddp_is_exact(on_ranks):
    assert max(on_ranks(2, ddp_errors)) < 1e-7


def nested_errors(checkpointing: dict | None) -> float:
    """Evaluate another batch, of another length, between forward and backward of a batch."""
    cp, batch, other = context(), labelled(), labelled(1, 7, seed=5)
    whole, sharded = tiny_model("llama", None), tiny_model("llama", "context_parallel")
    if checkpointing is not None:
        sharded.gradient_checkpointing_enable(checkpointing)
        sharded.train()
    whole(**batch, use_cache=False).loss.backward()
    expected = whole(**other, use_cache=False).loss
    with cp.shard(batch, sharded) as local:
        loss = sharded(**local).loss
        with torch.no_grad(), cp.shard(other, sharded) as inner:
            found = reduced(sharded(**inner).loss)
        loss.backward()
    gradients = [error(reduced(a.grad), b.grad) for a, b in zip(sharded.parameters(), whole.parameters())]
    return max(error(found, expected), *gradients)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_blocks_nest(on_ranks, checkpointing):
    assert max(on_ranks(2, nested_errors, checkpointing)) < 1e-6


def errors_of_two_batches(checkpointing: dict | None) -> float:
    """Compute the gradients of two batches together, after both blocks were left."""
    cp, both = context(), (labelled(), labelled(1, 7, seed=5))
    whole, sharded = tiny_model("llama", None), tiny_model("llama", "context_parallel")
    if checkpointing is not None:
        sharded.gradient_checkpointing_enable(checkpointing)
        sharded.train()
    sum(whole(**batch, use_cache=False).loss for batch in both).backward()
    losses = []
    for batch in both:
        with cp.shard(batch, sharded) as local:
            losses.append(sharded(**local).loss)
    sum(losses).backward()
    return max(error(reduced(a.grad), b.grad) for a, b in zip(sharded.parameters(), whole.parameters()))


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_backward_may_run_after_the_block_and_of_several_batches_at_once(on_ranks, checkpointing):
    assert max(on_ranks(2, errors_of_two_batches, checkpointing)) < 1e-6


def test_a_block_is_entered_once():
    block = context().shard(labelled())
    with block:
        pass
    with pytest.raises(RuntimeError, match=r"call cp.shard"), block:
        pass


def test_training_goes_on_unsharded_after_a_shard():
    """Recomputation outside of a batch is refused only for layers that ran inside of one."""
    cp, batch, model = context(), labelled(), tiny_model("llama", "context_parallel")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    with cp.shard(batch, model) as local:
        model(**local).loss.backward()
    model(**batch, use_cache=False).loss.backward()
