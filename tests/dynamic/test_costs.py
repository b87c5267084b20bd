"""Tests of the work that costs are estimated from."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.dynamic.costs import counts
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask
from hf_context_parallel.planning.workload import workload
from tests.helpers.examples import examples


@examples(100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=9), min_size=1, max_size=3), st.integers(1, 5))
def test_counts_are_those_of_the_mask(rows, size):
    pairs, keys = counts(np.concatenate(rows), np.array([len(lengths) for lengths in rows]), size)
    for lengths, *found in zip(rows, pairs, keys):
        layout = zigzag(-(-sum(lengths) // (2 * size)) * 2 * size, size)
        edges = np.cumsum([0, *lengths]).tolist()
        row = tuple(((start, stop),) for start, stop in zip(edges, edges[1:]))
        expected = workload(layout, Mask(layout.length, (row,)))
        assert tuple(map(tuple, found)) == (expected.pairs, expected.read)
