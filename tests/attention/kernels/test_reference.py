"""Tests of attention dropout, which the reference kernel computes, on simulated groups."""

import pytest
import torch

from hf_context_parallel.attention.kernels import reference
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.layout import contiguous, zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows
from tests.helpers.ring import HOW, MASKS, PLAIN, SCALE, check, ring, tensors
from tests.helpers.simulated import allowed


def read_out(layout, mask, whole, scores, sinks=None):
    """Read the attention weights `[B, H, S, S]` of a group out of its outputs, by one-hot values."""
    query, key, value, grad = whole
    told = torch.eye(mask.length, dtype=query.dtype)[None, :, None].expand(*value.shape[:3], -1)
    unused = grad[..., :1].expand(*grad.shape[:3], mask.length)
    output, *_ = ring(layout, mask, [query, key, told, unused], scores=scores, sinks=sinks)
    return output.transpose(1, 2)


@pytest.mark.parametrize("most", [reference.MOST_SCORES, 60])
@pytest.mark.parametrize("how", [{}, HOW["softcap and sinks"]], ids=["", "softcap and sinks"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "name", ["longer than a shard", "padding left, right, inside and everywhere", "bidirectional windows in chunks"]
)
def test_dropout_leaves_out_the_same_forward_and_backward(name, size, how, most, monkeypatch):
    """Compare all gradients with those of dense attention that drops the same weights as the forward."""
    monkeypatch.setattr(reference, "MOST_SCORES", most)
    mask = MASKS[name]
    layout, whole = zigzag(mask.length, size), tensors(mask)
    how = {**how, "scores": how.get("scores", PLAIN)._replace(dropout_p=0.4, seed=3)}
    seen = allowed(mask)[:, None]
    kept = (read_out(layout, mask, whole, **how) != 0).double() / 0.6
    assert not kept.any(1)[~seen[:, 0]].any() and 0.5 < (kept != 0).sum() / (4 * seen.sum()) < 0.7
    check(layout, mask, whole, **how, kept=kept)


def test_dropout_is_decided_by_its_seed():
    mask = MASKS["longer than a shard"]
    layout, whole = zigzag(mask.length, 3), tensors(mask)
    first, again, other = (
        ring(layout, mask, whole, scores=Scores(SCALE, dropout_p=0.2, seed=seed)) for seed in (1, 1, 2)
    )
    assert all(x.equal(y) for x, y in zip(first, again))
    assert not any(x.equal(y) for x, y in zip(first, other))


@pytest.mark.parametrize("most", [reference.MOST_SCORES, 1])
@pytest.mark.parametrize("layout", [zigzag, contiguous])
def test_dropout_is_another_for_every_query(layout, most, monkeypatch):
    """Check that dropout differs between ranks, rows, heads, queries and owners of keys.

    All ranks have the same seed, so without care they would drop the same weights of every tile."""
    monkeypatch.setattr(reference, "MOST_SCORES", most)
    size, tokens = 3, 48
    mask = Mask(size * tokens, whole_rows(2, size * tokens), Pattern(causal=False))
    layout = layout(mask.length, size)
    kept = read_out(layout, mask, tensors(mask), Scores(SCALE, dropout_p=0.5, seed=4)) != 0
    order = torch.cat([layout.positions(rank) for rank in range(size)])
    tiles = kept[:, :, order][..., order].reshape(-1, tokens)  # pattern of each query over the keys of each rank
    assert len(tiles) == 2 * 4 * size * tokens * size == len(tiles.unique(dim=0))


@pytest.mark.parametrize(
    ("dropout_p", "seeds"),
    [
        pytest.param(0.1, 300, marks=pytest.mark.exhaustive),
        pytest.param(0.5, 300, marks=pytest.mark.exhaustive),
        (0.5, 100),
    ],
)
def test_dropout_is_right_on_average(dropout_p, seeds):
    """Check dropout over many seeds: the mean and the spread of the weights, and the share that is dropped."""
    mask = Mask(14, whole_rows(1, 14))
    layout, whole, seen = (
        zigzag(14, 2),
        tensors(mask, heads=2, key_heads=1),
        allowed(mask)[:, None].expand(1, 2, 14, 14),
    )
    drawn = torch.stack(
        [read_out(layout, mask, whole, Scores(SCALE, dropout_p=dropout_p, seed=seed)) for seed in range(seeds)]
    )[:, seen]
    truth = read_out(layout, mask, whole, PLAIN)[seen]
    spread = truth * (dropout_p / (1 - dropout_p) / seeds) ** 0.5
    deviations = (drawn.mean(0) - truth) / spread
    assert deviations.abs().max() < 4.5 and 0.85 < deviations.std() < 1.15
    left_out = (drawn == 0).double().mean()
    assert abs(left_out - dropout_p) < 4 * (dropout_p * (1 - dropout_p) / drawn.numel()) ** 0.5
