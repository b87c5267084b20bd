"""Intervals against Python's sets, and layouts: where each token lives, and how evenly."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import allowed, layouts, rows

from hf_context_parallel.planning.balanced import balanced, make_layout, work_of_chunks
from hf_context_parallel.planning.intervals import difference, intersection, total, union
from hf_context_parallel.planning.layout import contiguous, zigzag
from hf_context_parallel.planning.mask import Mask
from hf_context_parallel.planning.workload import demand

intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=10)
sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 257, 1000, 1024]))


def members(pairs):
    return {member for start, stop in pairs for member in range(start, stop)}


def canonical(numbers):
    """A set of integers as the one list of sorted, disjoint, non-touching intervals that holds them."""
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    stops = sorted(number + 1 for number in numbers if number + 1 not in numbers)
    return list(zip(starts, stops))


@given(intervals, intervals)
def test_intervals_are_sets(left, right):
    left_set, right_set = members(left), members(right)
    assert union(left) == canonical(left_set)
    assert union([*left, *right]) == canonical(left_set | right_set)
    assert intersection(union(left), union(right)) == canonical(left_set & right_set)
    assert difference(union(left), union(right)) == canonical(left_set - right_set)
    assert total(union(left)) == len(left_set)


@settings(max_examples=60)
@given(layouts(max_length=5000, sizes=sizes))
def test_every_token_has_one_place(layout):
    positions = [layout.positions(rank) for rank in range(layout.size)]
    assert torch.cat(positions).sort().values.equal(torch.arange(layout.length))
    assert [len(held) for held in positions] == [layout.local_length(rank) for rank in range(layout.size)]
    for rank, held in enumerate(positions):
        assert (held.diff() > 0).all()
        assert held.tolist() == sorted(members(layout.intervals(rank)))
        for index in {0, len(held) // 2, len(held) - 1} if len(held) else ():
            assert layout.locate(int(held[index])) == (rank, index)


@given(layouts(max_length=200))
def test_locate_is_the_inverse_of_positions(layout):
    places = [layout.locate(position) for position in range(layout.length)]
    assert [int(layout.positions(rank)[index]) for rank, index in places] == list(range(layout.length))
    for outside in (-1, layout.length):
        with pytest.raises(IndexError, match=f"position {outside} is outside a sequence of {layout.length} tokens"):
            layout.locate(outside)


@given(layouts(max_length=2000, sizes=st.integers(1, 100)))
def test_restore_restores(layout):
    sequence = torch.randperm(layout.length)
    dealt = torch.cat([sequence[layout.positions(rank)] for rank in range(layout.size)])
    assert dealt[layout.restore()].equal(sequence)


@given(layouts(max_length=5000, sizes=sizes))
def test_ranks_hold_equally_many_tokens_up_to_one_a_chunk(layout):
    lengths = [layout.local_length(rank) for rank in range(layout.size)]
    assert max(lengths) - min(lengths) <= len(layout.chunk_owners) // layout.size


@given(st.integers(1, 6), st.integers(1, 40))
def test_which_chunks_a_rank_holds(chunk, size):
    for rank in range(size):
        zigzag_chunks = (rank, 2 * size - 1 - rank)
        expected = (
            [*range(rank * chunk, (rank + 1) * chunk)],
            [position for index in zigzag_chunks for position in range(index * chunk, (index + 1) * chunk)],
        )
        assert contiguous(size * chunk, size).positions(rank).tolist() == expected[0]
        assert zigzag(2 * size * chunk, size).positions(rank).tolist() == expected[1]


def unevenness(layout):
    """How many more keys the queries of the busiest rank read than the idlest's, in one causal document."""
    work = [int((layout.positions(rank) + 1).sum()) for rank in range(layout.size)]
    return max(work) - min(work)


@settings(max_examples=40)
@given(st.integers(1, 8), sizes)
def test_zigzag_deals_causal_work_equally(chunk, size):
    assert unevenness(zigzag(2 * size * chunk, size)) == 0
    assert size == 1 or unevenness(contiguous(2 * size * chunk, size)) > 0


@given(st.integers(1, 3000), st.integers(2, 40))
def test_zigzag_is_as_even_as_its_chunks(length, size):
    """Each of a rank's two chunks is at most a token longer than another's, and a token reads `length` keys at "
    "most."""
    assert unevenness(zigzag(length, size)) <= 2 * (length + length // size)


def work_of_ranks(layout, mask):
    return [int((allowed(mask)[0].sum(-1))[layout.positions(rank)].sum()) for rank in range(layout.size)]


@settings(max_examples=150)
@given(st.integers(1, 400), st.integers(1, 12), st.data())
def test_balanced_is_never_less_even_than_zigzag(length, size, data):
    mask = Mask(length, (data.draw(rows(length)),))
    layout = balanced(length, size, mask.rows[0], finest=1)
    chunks = len(layout.chunk_owners)
    assert torch.cat([layout.positions(rank) for rank in range(size)]).sort().values.equal(torch.arange(length))
    assert all(layout.chunk_owners.count(rank) == chunks // size for rank in range(size))
    if length % chunks == 0:
        assert {layout.local_length(rank) for rank in range(size)} == {length // size}
    # No more stretches than zigzag has, so plans have no more pieces.
    assert sum(owner != after for owner, after in zip(layout.chunk_owners, layout.chunk_owners[1:])) <= 2 * size - 2
    assert max(work_of_ranks(layout, mask)) <= max(work_of_ranks(zigzag(length, size), mask))
    assert sum(work_of_chunks(length, chunks, mask.rows[0])) == int(allowed(mask).sum())
    assert balanced(length, size, mask.rows[0], finest=1) == layout


@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_balanced_shares_the_work_of_packed_documents(size):
    length = size << 13
    lengths = [length * 4 // 10, length * 3 // 10, length // 10, *[length // 1000] * 150]
    edges = [0, *accumulate(lengths), length]
    documents = [((start, stop),) for start, stop in zip(edges, edges[1:])]
    pairs = sum((stop - start) * (stop - start + 1) // 2 for ((start, stop),) in documents)
    layout = balanced(length, size, documents)
    uneven, even = (max(demand(a, Mask(length, (tuple(documents),))).pairs) for a in (zigzag(length, size), layout))
    assert uneven > 1.2 * pairs / size and even < 1.04 * pairs / size


def test_balanced_is_zigzag_where_ranks_hold_few_tokens():
    for length, few in ((6144, True), (8192, False)):
        edges = [length * share // 16 for share in (0, 3, 9, 11, 16)]
        documents = [((start, stop),) for start, stop in zip(edges, edges[1:])]
        dealt, even = zigzag(length, 4), balanced(length, 4, documents)
        assert even != dealt and make_layout("balanced", length, 4, documents) == (dealt if few else even)


def test_balanced_of_one_document_is_zigzag():
    for size in (1, 2, 3, 7, 8):
        assert balanced(16 * size, size, [((0, 16 * size),)]) == zigzag(16 * size, size)


def test_balanced_shares_the_work_of_all_rows():
    """Long documents at the beginning of one row and at the end of another: together they are even."""
    rows = [[((0, 512),), ((512, 576),)], [((0, 64),), ((64, 576),)]]
    layout = balanced(576, 4, [document for row in rows for document in row], finest=4)
    work = demand(layout, Mask(576, tuple(map(tuple, rows)))).pairs
    assert max(work) < 1.05 * sum(work) / 4
