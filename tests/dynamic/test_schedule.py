"""Schedules of dynamic CP, which are arithmetic and never slower than static CP or the greedy rule."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.dynamic import stages_of_greedy_rule
from hf_context_parallel.dynamic.costs import LLAMA_8B, Costs
from hf_context_parallel.dynamic.groups import capacity, sizes
from hf_context_parallel.dynamic.schedule import in_order, make_schedule
from hf_context_parallel.planning.layout import FIXED_LAYOUTS
from hf_context_parallel.planning.machine import CPU, H100_NODE
from tests.helpers.examples import examples

COSTS = {
    "GPUs": Costs.of(LLAMA_8B, H100_NODE),
    "GPUs, sharded weights": Costs.of(LLAMA_8B, H100_NODE, sharded=True),
    "CPU cores": Costs.of(LLAMA_8B, CPU),
    "pairs alone": Costs(pair=1, token=0),
    "tokens alone": Costs(pair=0, token=1),
}


@st.composite
def batches(draw):
    """Draw lengths of samples, a number of ranks, the largest group, and the most tokens that a rank holds."""
    extent = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    ranks = extent * draw(st.integers(1, 3))
    most = draw(st.integers(2, 300))
    longest = capacity(extent, most)
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=25))
    return lengths, ranks, extent, most


def assert_complete(schedule, extent, most):
    """Assert that each sample is in one group that has room for it, and each round's groups hold every rank once."""
    lengths, ranks, layout = schedule.lengths, schedule.ranks, schedule.layout
    dealt = [sample for groups in schedule.rounds for group in groups for sample in group.samples]
    assert sorted(dealt) == list(range(len(lengths)))
    for groups in schedule.rounds:
        assert any(group.samples for group in groups)
        assert [rank for group in groups for rank in range(group.first, group.first + group.size)] == list(
            range(ranks)
        )
        for group in groups:
            assert group.size in sizes(extent) and group.first % group.size == 0
            row = sum(lengths[sample] for sample in group.samples)
            chunks = len(FIXED_LAYOUTS[layout](0, group.size).chunk_owners)
            assert -(-row // chunks) * chunks <= most * group.size
    assert schedule.idle.min() >= -1e-9


@examples(150, deadline=None)
@given(batches(), st.sampled_from(sorted(COSTS)), st.sampled_from(sorted(FIXED_LAYOUTS)))
def test_a_schedule_is_complete_and_fits(batch, costs, layout):
    lengths, ranks, extent, most = batch
    schedule = make_schedule(lengths, ranks, extent, most, COSTS[costs], layout)
    assert schedule == make_schedule(list(lengths), ranks, extent, most, COSTS[costs], layout)
    assert_complete(schedule, extent, most)


@examples(150, deadline=None)
@given(batches(), st.sampled_from(sorted(COSTS)))
def test_a_schedule_is_never_slower_than_static(batch, costs):
    lengths, ranks, extent, most = batch
    schedule = make_schedule(lengths, ranks, extent, most, COSTS[costs])
    for room in (0, capacity(extent, most)):  # one sample per row, and packed rows
        assert schedule.total <= in_order(lengths, ranks, extent, room, COSTS[costs]).total * (1 + 1e-9)


@examples(40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8, 16]), st.sampled_from([2048, 4096]), st.integers(2, 6))
def test_a_schedule_is_never_slower_than_the_greedy_rule(seed, ranks, most, samples):
    longest = min(16384, ranks * most)
    draws = np.random.default_rng(seed).lognormal(np.log(3000), 0.8, samples * ranks)
    lengths = np.clip(draws, 1024, longest).astype(int).tolist()
    for costs in (COSTS["GPUs"], COSTS["GPUs, sharded weights"]):
        stages = stages_of_greedy_rule(lengths, ranks, most, costs, node=ranks if costs.in_step else 1)
        schedule = make_schedule(lengths, ranks, ranks, most, costs)
        assert schedule.total <= sum(stage.max() for stage in stages) * (1 + 1e-9)


def test_a_long_sample_gets_more_ranks_than_it_needs_where_others_would_be_idle():
    costs = COSTS["GPUs"]
    [groups] = make_schedule([16000], 8, 8, 16384, costs).rounds
    assert [(group.size, group.samples) for group in groups] == [(8, (0,))]
    short = make_schedule([16000] * 8, 8, 8, 16384, COSTS["pairs alone"])
    assert short.idle.max() < 0.01


def test_short_samples_are_not_split_where_messages_are_dear():
    schedule = make_schedule([1000] * 8, 8, 8, 1024, COSTS["CPU cores"])
    assert [[group.size for group in groups] for groups in schedule.rounds] == [[1] * 8]


def test_a_sample_that_fits_nowhere_is_named():
    with pytest.raises(ValueError, match=r"sample 1 has 33 tokens, and a group of all 4 ranks holds 32.*Raise"):
        make_schedule([8, 33, 5], 8, 4, 8, COSTS["GPUs"])
    with pytest.raises(ValueError, match="a has 33 tokens"):
        make_schedule([33], 4, 4, 9, COSTS["GPUs"], names=["a"])
    with pytest.raises(ValueError, match="no samples"):
        make_schedule([], 4, 4, 9, COSTS["GPUs"])


@pytest.mark.parametrize("costs", ["GPUs", "GPUs, sharded weights"])
def test_a_thousand_ranks(costs):
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(3000), 0.8, 2048), 1024, 16384).astype(int).tolist()
    schedule = make_schedule(lengths, 1024, 8, 4096, COSTS[costs])
    assert_complete(schedule, 8, 4096)
    sized = groupby(sorted(group.size for groups in schedule.rounds for group in groups))
    assert schedule.idle.mean() < 0.15 and {size for size, _ in sized} <= {1, 2, 4, 8}
