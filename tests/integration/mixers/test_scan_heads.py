"""Tests of scans that share their heads among ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.distributed.token_exchange import deal_heads
from hf_context_parallel.integration.mixers import scan_heads
from hf_context_parallel.integration.mixers.resharding import sequences
from tests.helpers.examples import examples
from tests.helpers.mixers import assert_same_on_shards, dense, random, shapes_given, shards
from tests.helpers.models import needs_transformers
from tests.helpers.simulated import Network, SimulatedExchange


@examples(40)
@given(shards(), st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(0, 6))
def test_scan_by_heads_is_that_of_whole_sequences(every, groups, ratio, turn):
    count, (rows, length) = groups * ratio, (every[0].batch_size, every[0].length)
    value, gate, key = random(rows, length, count, 2), random(rows, length, count), random(rows, length, groups, 2)
    scale = random(count)
    for tensor in (value, gate, key, scale):
        tensor.requires_grad_()

    def scanned(value, gate, key, scale):
        key = key.repeat_interleave(value.shape[-2] // max(1, key.shape[-2]), dim=-2)
        return (value * gate[..., None] * key).cumsum(-3) * scale[:, None]

    def truth(tensors, parameters):
        output = torch.zeros_like(value)
        for row, start, stop in sequences(every[0]):
            alone = scanned(*(x[row, start:stop] for x in tensors), *parameters)
            output = output.index_put((torch.tensor(row), torch.arange(start, stop)), alone)
        return output

    network = Network(len(every), 120.0)

    def compute(rank, local, parameters):
        shares = deal_heads(count, len(every), turn)
        mine = shares[rank]
        geometry = scan_heads.Heads(every[rank], SimulatedExchange(network, rank))
        whole = geometry.whole(local, shares)
        own = parameters[0][mine.start : mine.stop]
        parts = zip(*(x.split([sequence.length for sequence in geometry.sequences]) for x in whole))
        return geometry.sharded(torch.cat([scanned(*part, own) for part in parts]), shares)

    assert_same_on_shards(every, [value, gate, key], [scale], compute, truth)


@pytest.mark.parametrize(
    ("model_type", "function", "count"),
    [("kimi_linear", "chunk_kimi_delta_attention", 4), ("nemotron_h", "mamba2_chunk_scan", 8)],
)
def test_a_rank_scans_its_share_of_the_heads(on_ranks, model_type, function, count):
    for seen in on_ranks(4, shapes_given, model_type, function, dense(61)):
        assert seen and all(shape[:3] == (1, 61, count // 4) for shape in seen)


@needs_transformers("5.23", "Transformers 5.17 repeats shared keys before it calls the function")
def test_shared_keys_travel_once_where_shares_are_whole_groups(on_ranks):
    for seen in on_ranks(2, shapes_given, "qwen3_next", "torch_chunk_gated_delta_rule", dense(61)):
        assert seen and all(shape[:3] == (1, 61, 1) for shape in seen)  # of two, each of two heads
