"""Tests of the balanced layout: it shares the work of packed documents evenly."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.planning.balanced import GAIN, balanced, make_layout, padded_layout, work_of_chunks
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask
from hf_context_parallel.planning.workload import workload
from tests.helpers.examples import examples
from tests.helpers.simulated import allowed, rows


def work_of_ranks(layout, mask):
    return [int((allowed(mask)[0].sum(-1))[layout.positions(rank)].sum()) for rank in range(layout.size)]


@examples(150)
@given(st.integers(1, 400), st.integers(1, 12), st.data())
def test_balanced_is_never_less_even_than_zigzag(length, size, data):
    mask = Mask(length, (data.draw(rows(length)),))
    layout = balanced(length, size, mask.rows[0], finest=1)
    chunks = len(layout.chunk_owners)
    assert torch.cat([layout.positions(rank) for rank in range(size)]).sort().values.equal(torch.arange(length))
    assert all(layout.chunk_owners.count(rank) == chunks // size for rank in range(size))
    if length % chunks == 0:
        assert {layout.local_length(rank) for rank in range(size)} == {length // size}
    # There are no more stretches than in zigzag, so plans have no more pieces.
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
    uneven, even = (max(workload(a, Mask(length, (tuple(documents),))).pairs) for a in (zigzag(length, size), layout))
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
    """Balance two rows together: one has a long document at its beginning, the other at its end."""
    rows = [[((0, 512),), ((512, 576),)], [((0, 64),), ((64, 576),)]]
    layout = balanced(576, 4, [document for row in rows for document in row], finest=4)
    work = workload(layout, Mask(576, tuple(map(tuple, rows)))).pairs
    assert max(work) < 1.05 * sum(work) / 4


def packed(length, *shares):
    """Documents with these shares of a row, in hundredths."""
    edges = [length * share // 100 for share in accumulate((0, *shares))]
    return [((start, stop),) for start, stop in zip(edges, edges[1:])]


def busiest(layout, documents):
    return max(workload(layout, Mask(layout.length, (tuple(documents),))).pairs)


def test_auto_is_balanced_where_that_shares_the_work_more_evenly():
    length = 4 << 12
    assert make_layout("auto", length, 4) == make_layout("auto", length, 4, packed(length, 100)) == zigzag(length, 4)
    gains = set()
    for shares in ((40, 30, 20, 10), (50, 50), (10, 80, 10), (97, 3), *((2 * n, 100 - 2 * n) for n in range(1, 20))):
        documents = packed(length, *shares)
        even, dealt = zigzag(length, 4), make_layout("balanced", length, 4, documents)
        gains.add(gain := busiest(dealt, documents) <= GAIN * busiest(even, documents))
        assert make_layout("auto", length, 4, documents) == (dealt if gain else even)
    assert gains == {True, False}
    few = length // 4
    assert make_layout("auto", few, 4, packed(few, 40, 30, 20, 10)) == zigzag(few, 4)  # ranks hold fewer than 2,048


@examples(150)
@given(st.integers(1, 400), st.integers(1, 8), st.integers(1, 60), st.data())
def test_no_rank_holds_more_than_it_may(length, size, half, data):
    documents, most = data.draw(rows(length)), 2 * half
    layout = balanced(length, size, documents, finest=1, most=most)
    chunks = len(layout.chunk_owners)
    if length <= size * most:  # else no layout fits
        assert -(-length // chunks) * chunks <= size * most


def test_finer_chunks_that_need_too_much_padding_are_not_made():
    length, size = 8196, 2
    documents = packed(length, 40, 30, 20, 10)
    free, tight = (padded_layout("auto", length, size, documents, most) for most in (None, 4098))
    assert free.length > size * 4098 and len(free.chunk_owners) > 2 * size
    assert tight == zigzag(length, size)
    assert padded_layout("auto", length, size, documents, free.length // size) == free
