"""Tests of how sequences are dealt to ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.integration.mixers.resharding import deal


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 6), st.integers(0, 5))
def test_sequences_are_dealt_evenly(lengths, size, turn):
    owners = deal(lengths, size, turn % size)
    loads = [sum(length for length, owner in zip(lengths, owners) if owner == rank) for rank in range(size)]
    assert len(owners) == len(lengths)
    assert max(loads) - min(loads) <= max(lengths, default=0)
    if lengths:
        assert owners[lengths.index(max(lengths))] == turn % size
