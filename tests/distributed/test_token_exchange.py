"""Tests of dealing heads to ranks."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.distributed.token_exchange import deal_heads, reads_of


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
