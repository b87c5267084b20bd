"""Tests of dropout: ranks draw other entries, and recomputation draws the same ones again."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hf_context_parallel.verification.types.tiny import tiny_config, tiny_model
from tests.helpers.models import context
from tests.helpers.whole_sequences import batch_of, largest_difference, loss_and_gradients


# Dropout
def dropped_entries(seed: int) -> tuple[list, list[float]]:
    """Return twice which entries of the first dropout are 0 on this rank, and the next number of the shared stream."""
    cp = context()
    model = tiny_model(tiny_config("gpt2", embd_pdrop=0.5), "context_parallel").train()
    patterns, following = [], []
    model.transformer.drop.register_forward_hook(lambda module, args, output: patterns.append((output == 0).tolist()))
    for _ in range(2):
        torch.manual_seed(seed)
        with cp.shard(batch_of(1, 20), model) as local:
            model(**local).loss.backward()
        following.append(torch.rand(()).item())
    return patterns, following


def test_ranks_drop_other_entries_and_the_same_ones_again(on_ranks):
    (first, after), (second, _) = results = on_ranks(2, dropped_entries, 7)
    assert first[0] == first[1] and second[0] == second[1] and first[0] != second[0]
    assert len({number for _, numbers in results for number in numbers}) == 1 and len(after) == 2
    (other, _), _ = on_ranks(2, dropped_entries, 8)
    assert other[0] != first[0]


def dropout_and_recomputation(reentrant: bool) -> float:
    changes = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.2}
    cp, batch = context(), batch_of(2, 20)
    model = tiny_model(tiny_config("gpt2", **changes), "context_parallel").train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, batch, cp))
    return largest_difference(*results)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_drops_the_same(on_ranks, reentrant):
    assert max(on_ranks(3, dropout_and_recomputation, reentrant)) < 1e-12


def mean_losses_with_dropout(seeds: int) -> tuple[float, float, float]:
    """Compute mean losses of all seeds on shards and on one process, and the standard error of the difference."""
    changes = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.3}
    cp, batch = context(), batch_of(1, 24)
    sharded, whole = (tiny_model(tiny_config("gpt2", **changes), x).train() for x in ("context_parallel", None))
    losses = torch.zeros(2, seeds, dtype=torch.float64)
    with torch.no_grad():
        for seed in range(seeds):
            torch.manual_seed(seed)
            with cp.shard(batch, sharded) as local:
                loss = sharded(**local).loss
            dist.all_reduce(loss)
            losses[0, seed] = loss
            losses[1, seed] = whole(**batch, use_cache=False).loss
    spread = (losses.var(dim=1).sum() / seeds).sqrt()
    return losses[0].mean().item(), losses[1].mean().item(), spread.item()


@pytest.mark.parametrize("seeds", [40, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_dropout_is_that_of_one_process_in_distribution(on_ranks, seeds):
    for sharded, whole, spread in on_ranks(2, mean_losses_with_dropout, seeds):
        assert spread > 0 and abs(sharded - whole) < 4 * spread
