"""Tests of the four strategies, with every mask and head count of the ring's tests, on simulated ranks in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.strategy import Shape, build_strategy
from hf_context_parallel.planning.balanced import balanced
from hf_context_parallel.planning.layout import contiguous, zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows
from hf_context_parallel.planning.plan import build_gathering_plan
from tests.helpers.examples import examples
from tests.helpers.ring import HOW, MASKS, SHAPES, check, on_rank, some_sinks, tensors
from tests.helpers.simulated import Log, SharingExchange, SimulatedExchange, cases, run


def exhaustive(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


WAYS = {
    "all_gather": lambda size: ("all_gather", 1),
    "a2a": lambda size: ("a2a", size),
    "a2a+p2p": lambda size: ("a2a+p2p", 2 if size % 2 == 0 else 1),
}
HEADS = {
    "keys for all ranks": {"heads": 8, "key_heads": 8},
    "fewer keys than ranks": {"heads": 8, "key_heads": 2},
    "heads that ranks do not divide": {"heads": 7, "key_heads": 7},
    "groups that ranks cut": {"heads": 9, "key_heads": 3},
    "one key head": {"heads": 5, "key_heads": 1},
}


@pytest.mark.parametrize("layout", [zigzag, exhaustive(contiguous)])
@pytest.mark.parametrize("size", [exhaustive(2), 3, 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, way, size, layout):
    mask = MASKS[name]
    check(layout(mask.length, size), mask, tensors(mask), way=WAYS[way](size))


@pytest.mark.parametrize("size", [2, exhaustive(3), 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SHAPES | HEADS)
def test_shapes(name, way, size):
    mask, shape = MASKS["longer than a shard"], (SHAPES | HEADS)[name]
    if shape.get("heads", 4) < size:  # a2a refuses fewer heads than ranks
        shape = {"heads": 6, "key_heads": 6}
    check(zigzag(mask.length, size), mask, tensors(mask, **shape), way=WAYS[way](size))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HOW)
def test_scores_and_sinks(name, way):
    mask = MASKS["padding left, right, inside and everywhere"]
    whole = tensors(mask, heads=7, key_heads=1)
    how = dict(HOW[name])
    if "sinks" in how:
        how["sinks"] = some_sinks(7)
    check(zigzag(mask.length, 4), mask, whole, way=WAYS[way](4), **how)


@pytest.mark.parametrize("kernel", ["reference"])
@pytest.mark.parametrize("way", WAYS)
def test_another_kernel(way, kernel):
    mask = MASKS["bidirectional windows in chunks"]
    check(zigzag(mask.length, 4), mask, tensors(mask), kernel, way=WAYS[way](4))


@pytest.mark.parametrize("size, together", [(2, 1), exhaustive(3, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("way", ["p2p", *WAYS])
@pytest.mark.parametrize("name", MASKS)
def test_memory_that_ranks_share(name, way, size, together):
    """Check that what was sent is never written again, by the sender or by a receiver that reads it where it lies."""
    mask, way = MASKS[name], (WAYS | {"p2p": lambda size: ("p2p", 1)})[way](size)
    check(zigzag(mask.length, size), mask, tensors(mask), way=way, together=together, exchange=SharingExchange)


@examples(40)
@given(
    cases(),
    st.sampled_from(sorted(WAYS)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([SimulatedExchange, SharingExchange]),
    st.data(),
)
def test_anything(case, way, key_heads, group, exchange, data):
    layout, mask = case
    size = layout.size
    inner = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    way = (way, {"all_gather": 1, "a2a": size, "a2a+p2p": inner}[way])
    heads = key_heads * group * -(-way[1] // (key_heads * group))
    check(layout, mask, tensors(mask, heads=heads, key_heads=key_heads), way=way, exchange=exchange)


@given(cases())
def test_gathering_takes_two_calls_and_merges_nothing(case):
    layout, mask = case
    mask = replace(mask, pattern=mask.pattern.rule)  # what blocks add is merged
    for rank in range(layout.size):
        plan = build_gathering_plan(layout, mask, rank)
        gathered = plan.steps[1]
        queries = [row for call in gathered.calls for start, stop in call.queries for row in range(start, stop)]
        bands = len({call.band for call in gathered.calls})
        gaps = any(len(document) > 1 for row in mask.rows for document in row)
        if mask.pattern.sliding_window is None:
            assert len(gathered.calls) <= 2
        if not (gaps and mask.pattern.sliding_window):  # padding inside moves the window of what follows
            assert len(queries) == len(set(queries))
            assert len(gathered.calls) <= 2 * max(1, bands)


@pytest.mark.parametrize("dtype", [torch.bfloat16, exhaustive(torch.float64)])
@pytest.mark.parametrize("size", [exhaustive(2), exhaustive(3), 4])
@pytest.mark.parametrize("way", ["p2p", *WAYS])
@pytest.mark.parametrize(
    "name", ["one document", "longer than a shard", "hundreds of tiny documents", "window", "chunks"]
)
def test_bytes_sent_are_the_strategys(name, way, size, dtype):
    mask, way = MASKS[name], (WAYS | {"p2p": lambda size: ("p2p", 1)})[way](size)
    for shape in ({"heads": 4, "key_heads": 4}, {"heads": 6, "key_heads": 2}, {"heads": 9, "key_heads": 3}):
        whole = tensors(mask, dim=8, value_dim=4, dtype=dtype, **shape)
        layout = zigzag(mask.length, size)

        def watched(exchange, layout=layout, whole=whole):
            log = Log()
            on_rank(log.exchange(exchange), layout, mask, whole, choose_kernel("cpu", "cpu"), way=way)
            return sum(log.sent.values())

        strategies = [build_strategy(*way, layout, mask, rank) for rank in range(size)]
        expected = [s.sent(Shape(shape["heads"], shape["key_heads"], 8, 4, dtype)) for s in strategies]
        assert run(size, watched) == [sum(sent) for sent in expected]


@pytest.mark.parametrize("way", ["p2p", *WAYS])
def test_documents_inside_a_rank_send_nothing(way):
    layout = zigzag(48, 4)
    mask = Mask(48, (tuple(((start, start + 3),) for start in range(0, 48, 3)),))
    way = (WAYS | {"p2p": lambda size: ("p2p", 1)})[way](4)
    for rank in range(4):
        strategy = build_strategy(*way, layout, mask, rank)
        assert strategy.sent(Shape(4, 2, 8, 8, torch.float32)) == (0, 0)
    check(layout, mask, tensors(mask), way=way)


@pytest.mark.parametrize("way", ["p2p", *WAYS])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(sliding_window=9), Pattern(False)])
def test_a_layout_made_for_documents(way, pattern):
    rows = [[0, 30, 37, 40, 48, 96], [0, 5, 64, 66, 80, 96]]
    rows = tuple(tuple(((start, stop),) for start, stop in zip(edges, edges[1:])) for edges in rows)
    layout = balanced(96, 4, [document for row in rows for document in row], finest=1)
    assert len(layout.chunk_owners) > 8  # it is not zigzag
    mask = Mask(96, rows, pattern)
    check(layout, mask, tensors(mask), way=(WAYS | {"p2p": lambda size: ("p2p", 1)})[way](4))


def test_work_is_shared_by_heads():
    """Pack a long document before short ones: ranks of zigzag have unequal work, ranks of a2a equal work."""
    mask = Mask(64, ((((0, 32),), *((((s, s + 2),)) for s in range(32, 64, 2))),))
    layout = zigzag(64, 2)
    ring = [build_strategy("p2p", 1, layout, mask, rank).plan.pairs for rank in range(2)]
    assert max(ring) > 1.2 * min(ring)
    strategies = [build_strategy("a2a", 2, layout, mask, rank) for rank in range(2)]
    pairs = [s.plan.pairs / 2 + s.own.pairs for s in strategies]
    assert pairs[0] == pairs[1] and sum(pairs) == sum(ring)


def test_too_few_heads_are_refused():
    strategy = build_strategy("a2a", 4, zigzag(16, 4), Mask(16, whole_rows(1, 16)), 0)
    assert strategy.refusal(4) is None
    assert "4 ranks" in strategy.refusal(3) and "a2a+p2p" in strategy.refusal(3)
