"""Tests of layouts: the rank and index of each token, and the balance of work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.planning.layout import contiguous, zigzag
from tests.helpers.examples import examples
from tests.helpers.simulated import layouts

sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 257, 1000, 1024]))


@examples(60)
@given(layouts(max_length=5000, sizes=sizes))
def test_every_token_has_one_place(layout):
    positions = [layout.positions(rank) for rank in range(layout.size)]
    assert torch.cat(positions).sort().values.equal(torch.arange(layout.length))
    assert [len(held) for held in positions] == [layout.local_length(rank) for rank in range(layout.size)]
    for rank, held in enumerate(positions):
        assert (held.diff() > 0).all()
        assert held.tolist() == [at for start, stop in layout.intervals(rank) for at in range(start, stop)]
        for index in {0, len(held) // 2, len(held) - 1} if len(held) else ():
            assert layout.locate(int(held[index])) == (rank, index)


@given(layouts(max_length=200))
def test_locate_is_the_inverse_of_positions(layout):
    places = [layout.locate(position) for position in range(layout.length)]
    assert [int(layout.positions(rank)[index]) for rank, index in places] == list(range(layout.length))
    for outside in (-1, layout.length):
        with pytest.raises(IndexError, match=f"position {outside} is outside of a sequence of {layout.length} tokens"):
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
    """Difference between the most and the least pairs that a rank computes, in one causal document."""
    work = [int((layout.positions(rank) + 1).sum()) for rank in range(layout.size)]
    return max(work) - min(work)


@examples(40)
@given(st.integers(1, 8), sizes)
def test_zigzag_deals_causal_work_equally(chunk, size):
    assert unevenness(zigzag(2 * size * chunk, size)) == 0
    assert size == 1 or unevenness(contiguous(2 * size * chunk, size)) > 0


@given(st.integers(1, 3000), st.integers(2, 40))
def test_zigzag_is_as_even_as_its_chunks(length, size):
    """Bound the unevenness: each of a rank's two chunks has at most one token more than another chunk.

    Each token reads at most `length` keys.
    """
    assert unevenness(zigzag(length, size)) <= 2 * (length + length // size)
