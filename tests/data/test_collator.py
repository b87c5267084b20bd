"""Tests of the data collator that shards."""

from __future__ import annotations

import pytest
import torch

import hf_context_parallel as hcp
from hf_context_parallel.data.batch import SHARD
from tests.helpers.models import context, labelled


def collator_errors() -> float:
    """The collator yields the shard that `shard` makes of the whole batch."""
    import pickle

    cp, batch = context(), labelled()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(2)]
    collate = hcp.ContextParallelDataCollator(torch.utils.data.default_collate, cp.config, cp.rank)
    collated = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(collate))(rows)))
    assert SHARD in collated
    with cp.shard(batch) as expected, cp.shard(collated) as found:
        assert found.keys() == expected.keys()
        for name in found.keys() - {"use_cache"}:
            assert torch.equal(found[name], expected[name])
    with (
        pytest.raises(ValueError, match="sharded for rank"),
        cp.shard(
            hcp.ContextParallelDataCollator(torch.utils.data.default_collate, cp.config, (cp.rank + 1) % cp.size)(rows)
        ),
    ):
        pass


def test_the_collator_shards_like_shard_and_pickles(on_ranks):
    on_ranks(2, collator_errors)


def test_the_collator_takes_a_tokenizer():
    from transformers import ByT5Tokenizer

    collate = hcp.ContextParallelDataCollator(ByT5Tokenizer(), hcp.ContextParallelConfig(size=2), 0)
    assert collate([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}])["input_ids"].tolist() == [[5, 0], [5, 0]]
