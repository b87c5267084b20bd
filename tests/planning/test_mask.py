"""Tests of masks read from cumulative lengths and from padding masks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.planning import mask as masks
from hf_context_parallel.planning.mask import Mask, Pattern
from tests.helpers.simulated import allowed


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_documents_are_found(lengths):
    """Find documents from cumulative lengths, empty ones included, and from positions, which show no empty ones."""
    total = sum(lengths)
    cumulative = torch.tensor([0, *lengths]).cumsum(0)
    expected = np.repeat(np.arange(len(lengths)), lengths)
    found = masks.from_cu_seqlens(cumulative, total)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    for documents in (found, *(masks.from_position_ids(position_ids) if total else ())):
        mask = Mask(total, (documents,), Pattern(causal=False))
        assert np.array_equal(allowed(mask)[0].numpy(), expected[:, None] == expected)


@pytest.mark.parametrize("edges", [[], [0], [1, 4], [0, 3], [0, 5], [0, 3, 2, 4]])
def test_cumulative_lengths_that_are_none(edges):
    with pytest.raises(
        ValueError, match=r"cu_seqlens is \[.*, and does not ascend from 0 to the row's length of 4 tokens"
    ):
        masks.from_cu_seqlens(torch.tensor(edges), 4)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_padding_is_found(visible):
    mask = Mask(
        len(visible), masks.from_attention_mask(torch.tensor([visible], dtype=torch.long)), Pattern(causal=False)
    )
    assert np.array_equal(allowed(mask)[0].numpy(), np.outer(visible, visible))
