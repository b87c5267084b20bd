"""Tests of short convolutions that get a halo of tokens from other ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.integration.mixers import halo
from hf_context_parallel.integration.mixers.resharding import sequences
from tests.helpers.mixers import assert_same_on_shards, dense, random, shapes_given, shards


@given(shards(), st.integers(1, 5))
def test_convolution_with_halos_is_that_of_whole_sequences(every, width):
    rows, length, channels = every[0].batch_size, every[0].length, 3
    x, weight, bias = random(rows, length, channels), random(channels, 1, width), random(channels)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()

    def convolved(x, weight, bias):
        padded = torch.nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
        return torch.nn.functional.conv1d(padded, weight, bias, groups=channels).transpose(1, 2)

    def truth(tensors, parameters):
        output = torch.zeros_like(x)
        for row, start, stop in sequences(every[0]):
            alone = convolved(tensors[0][row : row + 1, start:stop], *parameters)
            output = output.index_put((torch.tensor(row), torch.arange(start, stop)), alone[0])
        return output

    def compute(rank, local, parameters):
        geometry = halo.Halo(every[rank], width - 1, None, torch.device("cpu"))
        return geometry.trimmed(convolved(geometry.extended(local[0]), *parameters))

    assert_same_on_shards(every, [x], [weight, bias], compute, truth)


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_next"])
def test_a_rank_convolves_its_own_tokens_and_a_halo(on_ranks, model_type):
    for seen in on_ranks(4, shapes_given, model_type, "causal_conv1d_fn", dense(64)):
        assert seen and all(shape[0] == 1 and 16 < shape[2] <= 16 + 2 * 3 + 1 for shape in seen)
