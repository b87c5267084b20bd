"""Tests of the blocks that kernels compute a band in."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_context_parallel.attention.kernels.base import blocks
from hf_context_parallel.planning.tiles import Band
from tests.helpers.kernels import limits
from tests.helpers.simulated import in_band


@given(st.integers(1, 12), st.integers(1, 12), st.builds(Band, limits, limits), st.integers(1, 13))
def test_blocks_make_up_a_band(queries, keys, band, most):
    """Check the blocks of a band.

    They have each pair of the band once and no other pair. No query is in two blocks. No mask hides nothing. The first
    and the last key of a block are read.
    """
    expected = in_band(queries, keys, band)
    assume(expected.any(1).all())
    found, next_query = torch.zeros(queries, keys, dtype=torch.int), 0
    for block in blocks(queries, keys, band, most):
        (q0, q1), (k0, k1) = block.query, block.key
        assert q0 == next_query < q1 <= q0 + most and 0 <= k0 < k1 <= keys
        hidden = block.hidden(torch.device("cpu"))
        assert hidden is None or hidden.any()
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.int) if hidden is None else (~hidden).int()
        assert seen[:, 0].any() and seen[:, -1].any()
        found[q0:q1, k0:k1] += seen
        next_query = q1
    assert next_query == queries and found.equal(expected.int())
