"""Tests of the balanced layout: it shares the work of packed documents evenly."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.planning.balanced import balanced, make_layout, work_of_chunks
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
