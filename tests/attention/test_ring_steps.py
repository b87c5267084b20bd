"""Tests of the number of owners at each step of a ring."""

from dataclasses import replace

import pytest
import torch

from hf_context_parallel.attention.auto_strategy import choose
from hf_context_parallel.attention.ring_steps import MOST_BYTES, Ring, owners_a_step
from hf_context_parallel.attention.strategy import Shape
from hf_context_parallel.config import ContextParallelConfig
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.machine import machine_of
from hf_context_parallel.planning.mask import Mask, whole_rows

SHAPE = Shape(32, 8, 128, 128, torch.bfloat16)
H100 = machine_of(torch.device("cuda"), 8, kernel="cudnn")


def choice(size, tokens, machine=H100):
    mask = Mask(size * tokens, whole_rows(1, size * tokens))
    config = ContextParallelConfig(size=size, comm_type="p2p")
    return choose(config, "p2p", zigzag(mask.length, size), mask, SHAPE, machine)


def test_eight_ranks_of_16384_tokens_merge_three_times():
    assert choice(8, 16_384).together == 3  # so that 7 owners take 3 steps


@pytest.mark.parametrize("tokens", [4096, 16_384, 131_072, 1_048_576])
def test_buffers_are_bounded(tokens):
    _, _, count, groups, _ = choice(8, tokens)
    a_token = (
        SHAPE.key_heads / groups * 256 * (2 * 2 + 3 * 4)
    )  # two buffers of keys/values, and three of sums in float32
    assert count == 1 or (count - 1) * tokens * a_token <= MOST_BYTES


def test_a_slow_link_takes_fewer_owners():
    """Check that the keys of the first step travel while own keys are computed with, where that is possible."""
    counts = [choice(8, 4096, replace(H100, bandwidth=rate)).together for rate in (360e9, 20e9, 1e9)]
    assert counts[0] > counts[1] >= counts[2] == 1


def test_one_owner_is_enough_for_few():
    assert choice(2, 4096).together == 1
    assert owners_a_step(Ring(8, 100, 0, 0, False), SHAPE, H100) == 1  # nothing is read of others
