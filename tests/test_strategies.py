"""The four ways to communicate: every mask and head count that the ring takes, on simulated ranks, in float64."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Log, cases, run
from test_ring import HOW, MASKS, SHAPES, check, on_rank, some_sinks, tensors

from hf_context_parallel import ContextParallel
from hf_context_parallel.attention.auto_strategy import choose, inner_size, shares
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.strategy import Shape, build_strategy
from hf_context_parallel.config import ContextParallelConfig
from hf_context_parallel.distributed.token_exchange import deal_heads, reads_of
from hf_context_parallel.planning.balanced import balanced
from hf_context_parallel.planning.intervals import total, union
from hf_context_parallel.planning.layout import contiguous, zigzag
from hf_context_parallel.planning.machine import H100_NODE
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows
from hf_context_parallel.planning.plan import build_gathering_plan
from hf_context_parallel.planning.workload import demand


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
    if shape.get("heads", 4) < size:  # which a2a refuses
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


@settings(max_examples=40)
@given(cases(), st.sampled_from(sorted(WAYS)), st.integers(1, 3), st.integers(1, 3), st.data())
def test_anything(case, way, key_heads, group, data):
    layout, mask = case
    size = layout.size
    inner = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    way = (way, {"all_gather": 1, "a2a": size, "a2a+p2p": inner}[way])
    heads = key_heads * group * -(-way[1] // (key_heads * group))
    check(layout, mask, tensors(mask, heads=heads, key_heads=key_heads), way=way)


@given(cases())
def test_gathering_takes_two_calls_and_merges_nothing(case):
    layout, mask = case
    for rank in range(layout.size):
        plan = build_gathering_plan(layout, mask, rank)
        gathered = plan.steps[1]
        queries = [row for call in gathered.calls for start, stop in call.queries for row in range(start, stop)]
        bands = len({call.band for call in gathered.calls})
        gaps = any(len(document) > 1 for row in mask.rows for document in row)
        if not (gaps and mask.pattern.sliding_window):
            assert len(queries) == len(set(queries))
        if mask.pattern.sliding_window is None:
            assert len(gathered.calls) <= 2
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
    assert len(layout.chunk_owners) > 8  # not zigzag
    mask = Mask(96, rows, pattern)
    check(layout, mask, tensors(mask), way=(WAYS | {"p2p": lambda size: ("p2p", 1)})[way](4))


def test_work_is_shared_by_heads():
    """One long document in the beginning and short ones behind it: zigzag's ranks differ, a2a's do not."""
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


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 9))
def test_heads_are_dealt_once_and_evenly(heads, size, turn):
    shares = deal_heads(heads, size, turn)
    assert Counter(head for share in shares for head in share) == Counter(range(heads))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_indices_that_evaluation_made_serve_training():
    reads_of.cache_clear()
    with torch.inference_mode():
        reads = reads_of(range(1, 4), 2, torch.device("cpu"))
    shared = torch.ones(2, requires_grad=True)
    shared.index_select(0, reads).sum().backward()
    assert reads.tolist() == [0, 1, 1] and shared.grad.tolist() == [1, 2]


@given(cases())
def test_demand_is_what_plans_have(case):
    layout, mask = case
    counted = demand(layout, mask)
    plans = [build_strategy("p2p", 1, layout, mask, rank).plan for rank in range(layout.size)]
    if all(len(document) == 1 for row in mask.rows for document in row):  # without padding inside of documents
        assert list(counted.pairs) == [plan.pairs for plan in plans]
    assert list(counted.read) == [sum(step.tokens for step in plan.steps[1:]) for plan in plans]
    assert list(counted.owners) == [sum(step.tokens > 0 for step in plan.steps[1:]) for plan in plans]
    for merged, plan in zip(counted.merged, plans):
        steps = (union(run for call in step.calls for run in call.query_runs) for step in plan.steps[1:])
        assert merged == sum(map(total, steps))
    assert sum(counted.tokens) == sum(stop - start for row in mask.rows for d in row for start, stop in d)


@settings(max_examples=60)
@given(cases(), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.data())
def test_shares_are_those_of_strategies(case, key_heads, group, bfloat16, data):
    """What an estimate counts for a rank is the work of its plans, and for all ranks the bytes that they send."""
    layout, mask = case
    inner = data.draw(st.sampled_from([n for n in range(1, layout.size + 1) if layout.size % n == 0]))
    comm_type = data.draw(st.sampled_from(["p2p", "all_gather"])) if inner == 1 else "a2a+p2p"
    heads = key_heads * group * -(-inner // (key_heads * group))
    shape = Shape(heads, key_heads, 8, 4, torch.bfloat16 if bfloat16 else torch.float64)
    counted = shares(comm_type, inner, layout, mask, shape, MACHINE)
    strategies = [build_strategy(comm_type, inner, layout, mask, rank) for rank in range(layout.size)]
    assert sum(share.bytes for share in counted) == pytest.approx(sum(sum(s.sent(shape)) for s in strategies))
    if all(len(document) == 1 for row in mask.rows for document in row):  # without padding inside of documents
        dealt = deal_heads(heads, inner)
        for rank, (share, strategy) in enumerate(zip(counted, strategies)):
            shared = 0 if strategy.plan is None else strategy.plan.pairs * len(dealt[rank % inner])
            assert share.work == shared + (strategy.own.pairs * heads if strategy.own else 0)


MACHINE = replace(H100_NODE, node=4)


def chosen(mask, shape, size=4, **settings):
    config = ContextParallelConfig(size=size, comm_type="auto", **settings)
    return choose(config, "auto", zigzag(mask.length, size), mask, shape, MACHINE)


def test_auto_follows_the_mask_and_the_topology():
    shape = Shape(32, 8, 128, 128, torch.bfloat16)
    length = 1 << 15
    one = Mask(length, whole_rows(1, length))
    assert chosen(one, shape, size=8)[:2] == ("a2a+p2p", 4)  # heads within a node, keys between the two
    few = Shape(6, 6, 128, 128, torch.bfloat16)  # too few heads for a2a
    assert (
        chosen(Mask(length * 8, whole_rows(1, length * 8)), few, size=8, a2a_size=1).comm_type == "p2p"
    )  # hidden behind computing, unlike all_gather
    half = Mask(length, ((((0, length // 2),), *(((s, s + 64),) for s in range(length // 2, length, 64))),))
    choice = chosen(half, shape)
    assert choice.comm_type == "a2a" and "mean work" in choice.reason and "p2p" in choice.reason
    window = Mask(length, whole_rows(1, length), Pattern(sliding_window=1024))
    assert chosen(window, shape).comm_type in ("p2p", "all_gather")
    assert chosen(one, shape, size=1) == ("p2p", 1, "one rank")


def test_one_call_of_attention_has_one_way():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"comm_type=\['all_gather'\] is not one of 'p2p', 'all_gather'"):
        ContextParallel(ContextParallelConfig()).attention(q, q, q, comm_type=["all_gather"])


def test_groups_of_another_size_keep_what_they_can_of_subgroups():
    config = ContextParallelConfig(size=8, comm_type="a2a+p2p", a2a_size=4)
    assert [config.of_size(size).a2a_size for size in (8, 6, 2, 1)] == [4, 2, 2, 1]
    assert ContextParallelConfig(size=8).of_size(2) == ContextParallelConfig(size=2)


def test_layers_have_their_own():
    config = ContextParallelConfig(size=2, comm_type=["p2p", "a2a"])
    assert [config.comm_type_of("full_attention", layer) for layer in range(2)] == ["p2p", "a2a"]
    config.check_layers(2)
    by_type = ContextParallelConfig(size=2, comm_type={"sliding_attention": "p2p", "full_attention": "a2a"})
    assert by_type.comm_type_of("sliding_attention", 7) == "p2p"
    for wrong, message in (
        (lambda: config.check_layers(3), "lists 2 entries and the model has 3 layers"),
        (lambda: config.comm_type_of("full_attention", None), "does not know which layer"),
        (lambda: by_type.comm_type_of("chunked_attention", 0), "Add 'chunked_attention'"),
        (lambda: ContextParallelConfig(size=2, comm_type=["ring"]), r"comm_type\[0\]='ring' is not one of"),
        (lambda: ContextParallelConfig(comm_type={"full_atention": "p2p"}), "Did you mean 'full_attention'"),
        (lambda: ContextParallelConfig(size=4, a2a_size=3), "a2a_size=3 must divide size=4: 1, 2, 4"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_keys_go_to_one_rank_each_unless_told():
    config = ContextParallelConfig(size=8, comm_type="a2a+p2p")
    assert inner_size(config, "a2a+p2p", Shape(32, 4, 8, 8, torch.float32)) == 4
    assert inner_size(config, "a2a+p2p", Shape(32, 6, 8, 8, torch.float32)) == 2
    assert inner_size(replace(config, a2a_size=8), "a2a+p2p", Shape(32, 4, 8, 8, torch.float32)) == 8
