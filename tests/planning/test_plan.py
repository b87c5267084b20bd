"""Tests of plans, carried out on token numbers: each pair is computed once, and only keys that are read travel."""

import pickle
from collections import defaultdict, deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.planning.intervals import total, union
from hf_context_parallel.planning.layout import contiguous, zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows
from hf_context_parallel.planning.plan import build_plan
from hf_context_parallel.planning.tiles import FULL
from tests.helpers.examples import examples
from tests.helpers.simulated import allowed, cases, cut, in_band, layouts


def numbers(layout, mask, rank):
    """Number in the whole batch of each token of a rank, in local order: row * length + position."""
    positions = layout.positions(rank).numpy()
    return (np.arange(len(mask.rows))[:, None] * layout.length + positions).reshape(-1)


def seen_by(mask, queries):
    """Boolean matrix `[queries, tokens of the batch]` of the keys that the queries read."""
    matrix = np.zeros((len(queries), len(mask.rows) * mask.length), dtype=bool)
    per_row = allowed(mask).numpy()
    for index, query in enumerate(queries):
        row, position = divmod(int(query), mask.length)
        matrix[index, row * mask.length : (row + 1) * mask.length] = per_row[row, position]
    return matrix


def tiles(step):
    """(Query range, key range, band) of each tile of a step."""
    return [(*ranges, call.band) for call in step.calls for ranges in zip(call.queries, call.keys)]


def computed_by(plan, buffers, shape):
    """Count how often the plan computes each pair of its queries and all tokens.

    Args:
        buffers: the number of each token in the key buffer of each step.
    """
    count = np.zeros(shape, dtype=int)
    for step, keys in zip(plan.steps, buffers):
        for (q0, q1), (k0, k1), band in tiles(step):
            count[q0:q1, keys[k0:k1]] += in_band(q1 - q0, k1 - k0, band).numpy()
    return count


def check_calls(plan):
    """Check the guarantees that kernels rely on.

    No tile is empty. Every query of a tile reads a key, and every key is read. Limits are not negative, and a tile
    that is read entirely has none. Query ranges of a call ascend and do not overlap.
    """
    for step in plan.steps:
        for call in step.calls:
            assert call.queries and len(call.queries) == len(call.keys)
            assert all(start < stop for start, stop in (*call.queries, *call.keys))
            assert all(before[1] <= after[0] for before, after in zip(call.queries, call.queries[1:]))
            assert all(limit is None or limit >= 0 for limit in call.band)  # -1 means no limit to FlashAttention
            for (q0, q1), (k0, k1) in zip(call.queries, call.keys):
                tile = in_band(q1 - q0, k1 - k0, call.band)
                assert tile.any(0).all() and tile.any(1).all()
                assert tile.all() == (call.band == FULL) or q1 - q0 == k1 - k0 == 1
            for ranges, runs in ((call.queries, call.query_runs), (call.keys, call.key_runs)):
                assert [i for r in ranges for i in range(*r)] == [i for r in runs for i in range(*r)]


def check_buffers(plan):
    """Check that each received key is read and received once, and that gradients are summed where keys came from."""
    for step in plan.steps[1:]:
        everything = [(0, step.tokens)] if step.tokens else []
        assert union(keys for _, keys, _ in tiles(step)) == everything
        for transfers in (step.receives, step.grad_sends):
            ranges = [interval for transfer in transfers for interval in transfer.rows]
            assert union(ranges) == everything and total(ranges) == step.tokens


def deliver(sends, receives):
    """Deliver the messages of all ranks: list, for each rank, what arrives for its `receives`, in their order.

    Args:
        sends: (receiver, tokens) of each rank, in the order posted.
        receives: (sender, number of tokens) of each rank, in the order posted.
    """
    under_way = defaultdict(deque)
    for sender, messages in enumerate(sends):
        for receiver, tokens in messages:
            assert receiver != sender and len(tokens)
            under_way[sender, receiver].append(tokens)
    arrived = []
    for receiver, expected in enumerate(receives):
        arrived.append([under_way[sender, receiver].popleft() for sender, _ in expected])
        assert [len(tokens) for tokens in arrived[-1]] == [count for _, count in expected]
    assert not any(under_way.values()), "sent and never received"
    return arrived


def outgoing(transfers, buffer):
    return [(transfer.peer, buffer[rows_of(transfer)]) for transfer in transfers]


def incoming(*transfers):
    return [(transfer.peer, transfer.tokens) for transfer in transfers]


def rows_of(transfer):
    return np.concatenate([np.arange(*interval) for interval in transfer.rows])


def travel(plans, owned, together=1):
    """Carry out the forward pass: list the tokens in the key buffer of each rank at each step."""
    buffers = [[own] for own in owned]

    def distances(number):
        return range(1 + (number - 1) * together, min(1 + number * together, len(plans)))

    for number in range(1, len(plans[0].steps)):
        steps = [plan.steps[number] for plan in plans]
        arrived = deliver(
            [
                outgoing(step.forwards, held[-1]) + outgoing(step.direct_sends, own)
                for step, held, own in zip(steps, buffers, owned)
            ],
            [incoming(*step.receives) for step in steps],
        )
        for rank, (step, messages) in enumerate(zip(steps, arrived)):
            buffer = np.full(step.tokens, -1)
            for transfer, tokens in zip(step.receives, messages):
                buffer[rows_of(transfer)] = tokens
            assert set(buffer) <= set(np.concatenate([owned[(rank + d) % len(plans)] for d in distances(number)]))
            buffers[rank].append(buffer)
    return buffers


def return_gradients(plans, partial):
    """Carry out the backward pass: sum, at their owners, the `partial` gradients of each rank's key buffers."""
    size = len(plans[0].steps)
    for number in range(1, size + 1):
        before = [plan.steps[number - 1] for plan in plans]
        joins = [plan.steps[number].grad_receives if number < size else () for plan in plans]
        arrived = deliver(
            [outgoing(step.grad_sends, sums[number - 1]) for step, sums in zip(before, partial)],
            [incoming(*joining, *step.grad_returns) for joining, step in zip(joins, before)],
        )
        for sums, joining, step, messages in zip(partial, joins, before, arrived):
            for transfer, part in zip(joining, messages):
                sums[number][rows_of(transfer)] += part
            for transfer, part in zip(step.grad_returns, messages[len(joining) :]):
                sums[0][rows_of(transfer)] += part
    return [sums[0] for sums in partial]


def check_pairs(plan, buffers, seen):
    """Check that the plan computes each pair of the mask once, and no other pair."""
    assert np.array_equal(computed_by(plan, buffers, seen.shape), seen)
    assert plan.pairs == seen.sum() and plan.tokens == len(seen)


def check_plans(layout, mask, together=1):
    """Check all properties of the plans of a whole group."""
    plans = [build_plan(layout, mask, rank, together=together) for rank in range(layout.size)]
    owned = [numbers(layout, mask, rank) for rank in range(layout.size)]
    # The gradient of a key is a sum over the queries that read it. Here each query adds a number of its own.
    weights = np.random.default_rng(0).integers(1, 1 << 40, len(mask.rows) * layout.length)
    partial = []
    for plan, own, buffers in zip(plans, owned, travel(plans, owned, together)):
        check_calls(plan)
        check_buffers(plan)
        check_pairs(plan, buffers, seen_by(mask, own))
        partial.append([np.zeros(len(buffer), dtype=int) for buffer in buffers])
        for step, sums in zip(plan.steps, partial[-1]):
            for (q0, q1), (k0, k1), band in tiles(step):
                sums[k0:k1] += weights[own[q0:q1]] @ in_band(q1 - q0, k1 - k0, band).numpy()
    reads = seen_by(mask, np.arange(len(weights)))
    for own, returned in zip(owned, return_gradients(plans, partial)):
        assert np.array_equal(returned, weights @ reads[:, own])
    moved = sum(step.tokens for plan in plans for step in plan.steps[1:])
    assert sum(plan.sent_keys for plan in plans) == sum(plan.sent_gradients for plan in plans) == moved


TOGETHER = st.integers(1, 4)


@examples(100)
@given(cases(), TOGETHER)
def test_every_pair_once_and_every_gradient_returned(case, together):
    check_plans(*case, together)


@examples(5)
@given(cases(max_length=200, sizes=st.integers(20, 64)), TOGETHER)
def test_every_pair_once_in_groups_of_tens(case, together):
    check_plans(*case, together)


@pytest.mark.exhaustive
@examples(2000)
@given(cases(max_length=80, sizes=st.integers(1, 24)), TOGETHER)
def test_every_pair_once_exhaustively(case, together):
    check_plans(*case, together)


large_groups = given(cases(max_length=3000, sizes=st.sampled_from([128, 255, 512, 1024])), st.integers(0, 1023))


@examples(4)
@large_groups
def test_sampled_ranks_of_large_groups(case, rank):
    check_a_rank(*case, rank)


@pytest.mark.exhaustive
@examples(30)
@large_groups
def test_many_sampled_ranks_of_large_groups(case, rank):
    check_a_rank(*case, rank)


def check_a_rank(layout, mask, rank):
    """Check the plan of one rank, and its messages with the rank before."""
    rank %= layout.size
    plan, before = build_plan(layout, mask, rank), build_plan(layout, mask, (rank - 1) % layout.size)
    check_calls(plan)
    check_buffers(plan)
    own = numbers(layout, mask, rank)
    seen = seen_by(mask, own)
    read = seen.any(0)
    owners = [numbers(layout, mask, (rank + distance) % layout.size) for distance in range(layout.size)]
    check_pairs(plan, [own, *(keys[read[keys]] for keys in owners[1:])], seen)
    check_messages(plan, before)
    check_messages(before, plan)


def check_messages(sender, receiver):
    """Check that ranks send each other as many tokens as expected, at each step and in the same order."""

    def between(transfers, plan, peer):
        return [count for rank, count in incoming(*transfers) if rank == peer.rank]

    for number, (sent, received) in enumerate(zip(sender.steps, receiver.steps)):
        keys = between((*sent.forwards, *sent.direct_sends), sender, receiver)
        assert keys == between(received.receives, receiver, sender)
        joins = receiver.steps[number + 1].grad_receives if number + 1 < receiver.size else ()
        gradients = between(sent.grad_sends, sender, receiver)
        assert gradients == between((*joins, *received.grad_returns), receiver, sender)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16, 64])
def test_one_causal_document_in_zigzag(size):
    chunk = 6
    layout = zigzag(2 * size * chunk, size)
    plans = [build_plan(layout, Mask(layout.length, whole_rows(1, layout.length)), rank) for rank in range(size)]
    assert {plan.pairs for plan in plans} == {layout.length * (layout.length + 1) // 2 // size}
    untrimmed = size * (size - 1) * 2 * chunk  # each rank sends two chunks at each step but the last
    assert 4 * sum(plan.sent_keys for plan in plans) == 3 * untrimmed
    assert 4 * sum(plan.sent_gradients for plan in plans) == 3 * untrimmed
    assert all(len(tiles(step)) == 1 for plan in plans for step in plan.steps)
    # Keys travel as in a ring, to the rank before only. Gradients also return to their owner.
    assert all(
        transfer.peer == (plan.rank - 1) % size for plan in plans for s in plan.steps for transfer in s.forwards
    )
    assert all(len(step.direct_sends) == (number == 1) for plan in plans for number, step in enumerate(plan.steps))


@pytest.mark.parametrize("rank", [0, 400, 1023])
def test_one_causal_document_on_1024_ranks(rank):
    size, chunk = 1024, 64
    layout = zigzag(2 * size * chunk, size)
    plan = build_plan(layout, Mask(layout.length, whole_rows(1, layout.length)), rank)
    check_calls(plan)
    check_buffers(plan)
    assert plan.pairs * size == layout.length * (layout.length + 1) // 2
    # It reads both chunks of the ranks after it, and the first chunk of the ranks before it.
    assert sum(step.tokens for step in plan.steps[1:]) == chunk * (2 * (size - 1 - rank) + rank)


@pytest.mark.parametrize("window", [1, 5, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 12, pytest.param(64, marks=pytest.mark.exhaustive)])
def test_one_document_with_a_window_in_zigzag(size, window):
    """Chunks make tiles with themselves, and with the part of the chunk before that the window reaches."""
    chunk = 6
    layout = zigzag(2 * size * chunk, size)
    mask = Mask(layout.length, whole_rows(1, layout.length), Pattern(sliding_window=window))
    for plan in (build_plan(layout, mask, rank) for rank in range(size)):
        neighbours = {plan.rank - 1, plan.rank + 1} & set(range(size)) if window > 1 else set()
        reached = {(plan.rank + number) % size for number, step in enumerate(plan.steps) if number and step.tokens}
        assert reached == neighbours
        own = 1 if plan.rank == size - 1 else 2  # its two chunks are neighbours
        assert [len(tiles(step)) for step in plan.steps if step.calls] == [own, *(1 for _ in neighbours)]
        assert plan.steps[0].calls and sum(step.tokens for step in plan.steps[1:]) == (window - 1) * len(neighbours)


@given(st.integers(1, 9), st.integers(1, 100))
def test_a_bidirectional_document_is_read_by_all(size, length):
    layout = contiguous(length, size)
    plans = [
        build_plan(layout, Mask(length, whole_rows(1, length), Pattern(causal=False)), rank) for rank in range(size)
    ]
    assert [plan.pairs for plan in plans] == [layout.local_length(rank) * length for rank in range(size)]
    readers = [plan.tokens for plan in plans if plan.tokens]
    assert sum(plan.sent_keys for plan in plans) == sum(length - held for held in readers)


@given(layouts(max_length=100), st.data())
def test_documents_inside_a_rank_send_nothing(layout, data):
    edges = data.draw(st.lists(st.integers(0, layout.length), max_size=20))
    mask = Mask(
        layout.length, (cut(sorted([*edges, *layout.bounds]), layout.length),), Pattern(data.draw(st.booleans()))
    )
    plans = [build_plan(layout, mask, rank) for rank in range(layout.size)]
    assert all(plan.sent_keys == plan.sent_gradients == 0 for plan in plans)
    assert sum(plan.pairs for plan in plans) == allowed(mask).sum()


@given(cases())
def test_a_plan_pickles_and_is_the_same_wherever_it_is_built(case):
    plan = build_plan(*case, 0)
    assert pickle.loads(pickle.dumps(plan)) == plan == build_plan(*case, 0)
