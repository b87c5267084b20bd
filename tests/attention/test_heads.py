"""Tests of groups of heads: which there are, and attention that computes one after another."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.heads import heads_of_groups, most_groups
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, whole_rows
from tests.helpers.examples import examples
from tests.helpers.ring import HOW, MASKS, check, on_rank, some_sinks, tensors
from tests.helpers.simulated import Log, SharingExchange, cases, run

WAYS = {
    "p2p": lambda size: ("p2p", 1),
    "all_gather": lambda size: ("all_gather", 1),
    "a2a": lambda size: ("a2a", size),
    "a2a+p2p": lambda size: ("a2a+p2p", 2),
}


@given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 4), st.integers(1, 30))
def test_groups_deal_all_heads(ratio, key_heads, inner, groups):
    heads = ratio * key_heads
    found = heads_of_groups(heads, key_heads, inner, groups)
    assert [head for own, _ in found for head in own] == list(range(heads))
    assert [head for _, keys in found for head in keys] == list(range(key_heads))
    assert len(found) == min(groups, most_groups(key_heads, inner))
    for own, keys in found:
        assert list(own) == [head for head in range(heads) if head // ratio in keys]
        assert len(found) == 1 or len(keys) % inner == 0
    sizes = [len(keys) for _, keys in found]
    assert max(sizes) - min(sizes) <= inner


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MASKS)
def test_all_masks(name, way):
    mask = MASKS[name]
    heads = {"heads": 8, "key_heads": 4} if way != "p2p" else {"heads": 5, "key_heads": 5, "dim": 12, "value_dim": 5}
    check(zigzag(mask.length, 4), mask, tensors(mask, **heads), way=WAYS[way](4), groups=3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HOW)
def test_scores_and_sinks(name, way):
    mask = MASKS["padding left, right, inside and everywhere"]
    how = dict(HOW[name])
    if "sinks" in how:
        how["sinks"] = some_sinks(8)
    whole = tensors(mask, heads=8, key_heads=4)
    check(zigzag(mask.length, 2), mask, whole, way=WAYS[way](2), groups=2, exchange=SharingExchange, **how)


@examples(40)
@given(cases(), st.sampled_from(sorted(WAYS)), st.integers(1, 6), st.integers(1, 3), st.integers(2, 4), st.data())
def test_anything(case, way, key_heads, ratio, groups, data):
    layout, mask = case
    inner = data.draw(st.sampled_from([n for n in range(1, layout.size + 1) if layout.size % n == 0]))
    way = (way, {"p2p": 1, "all_gather": 1, "a2a": layout.size, "a2a+p2p": inner}[way])
    key_heads *= way[1]
    whole = tensors(mask, heads=key_heads * ratio, key_heads=key_heads)
    check(layout, mask, whole, way=way, groups=groups)


@pytest.mark.parametrize("way", WAYS)
def test_groups_send_as_many_bytes(way):
    mask, layout = MASKS["longer than a shard"], zigzag(61, 4)
    whole = tensors(mask, heads=16, key_heads=8, dtype=torch.bfloat16)

    def sent(groups):
        def watched(exchange):
            log = Log()
            kernel = choose_kernel("cpu", "cpu")
            on_rank(log.exchange(exchange), layout, mask, whole, kernel, way=WAYS[way](4), groups=groups)
            return sum(log.sent.values())

        return run(4, watched)

    assert sent(1) == sent(2) and sum(sent(1)) > 0


def test_groups_drop_weights_of_their_own():
    """Give all heads the same numbers. Those of a group drop the same weights only if a kernel draws them alike."""
    mask = Mask(24, whole_rows(1, 24))
    whole = [x[:, :, :1].expand(-1, -1, 4, -1).contiguous() for x in tensors(mask, heads=4, key_heads=4)]
    scores, kernel = Scores(0.3, dropout_p=0.5, seed=3), choose_kernel("reference", "cpu")
    outputs = [
        run(
            1,
            lambda mine, groups=groups: on_rank(
                mine, zigzag(24, 1), mask, whole, kernel, scores=scores, groups=groups
            ),
        )
        for groups in (4, 4, 1)
    ]
    (first, *_), (second, *_), _ = (found[0] for found in outputs)
    assert first.equal(second)
    assert not any(first[:, a].equal(first[:, b]) for a in range(4) for b in range(a))


def test_a_graph_does_not_keep_itself_alive():
    mask, kernel = Mask(8, whole_rows(1, 8)), choose_kernel("cpu", "cpu")
    query, key, value = (torch.randn(8, 4, 8, requires_grad=True) for _ in range(3))

    def work(exchange):
        strategy = build_strategy("p2p", 1, zigzag(8, 1), mask, 0, groups=2)
        how = {"strategy": strategy, "exchange": exchange, "kernel": kernel, "scores": Scores(0.3)}
        output = attention(query * 1, key * 1, value * 1, **how)
        return weakref.ref(output.grad_fn), weakref.ref(output.untyped_storage())

    gc.disable()
    try:
        assert [[gone() for gone in found] for found in run(1, work)] == [[None, None]]
    finally:
        gc.enable()
