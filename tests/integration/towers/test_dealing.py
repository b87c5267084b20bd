"""Costs of items, and their dealing to ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from hf_context_parallel.integration.towers.dealing import dealt, dealt_in_order
from hf_context_parallel.memory.tower_facts import TowerSizes
from tests.helpers.examples import examples

COSTS = st.lists(st.integers(1, 1000), min_size=1, max_size=20)


@examples(200)
@given(costs=COSTS, ranks=st.integers(1, 6))
@pytest.mark.parametrize("deal", [dealt, dealt_in_order])
def test_each_item_is_dealt_once(deal, costs, ranks):
    shares = deal(costs, ranks)
    assert len(shares) == ranks
    assert sorted(item for share in shares for item in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)


@examples(200)
@given(costs=COSTS, ranks=st.integers(1, 6))
def test_loads_are_bounded(costs, ranks):
    """Assert Graham's bound of dealing the most expensive first, and that of the best dealing in order."""
    least = max(max(costs), -(-sum(costs) // ranks))
    loads = [[sum(costs[item] for item in share) for share in deal(costs, ranks)] for deal in (dealt, dealt_in_order)]
    assert max(loads[0]) <= sum(costs) / ranks + max(costs) * (1 - 1 / ranks)
    assert least <= max(loads[1]) < sum(costs) / ranks + max(costs)


@examples(100)
@given(costs=COSTS, ranks=st.integers(1, 6))
def test_order_is_kept(costs, ranks):
    assert [item for share in dealt_in_order(costs, ranks) for item in share] == list(range(len(costs)))


def test_pairs_of_windows_and_whole_frames():
    """Compare with a count of all pairs: two layers, one of windows of two patches, and frames of 3 x 4 patches."""
    sizes = TowerSizes(width=8, inner=16, layers=2, windowed=1, side=2)
    places = [(frame, row, column) for frame in range(2) for row in range(3) for column in range(4)]
    full = sum(a[0] == b[0] for a in places for b in places)
    near = sum((a[0], a[1] // 2, a[2] // 2) == (b[0], b[1] // 2, b[2] // 2) for a in places for b in places)
    assert sizes.pairs(2, 3, 4) == full + near
    assert sizes.cost(2, 3, 4) == 2 * len(places) * (2 * 8 + 16) + full + near


def test_sizes_are_read_from_a_configuration():
    found = TowerSizes.of(Qwen2_5_VLVisionConfig(hidden_size=1280))
    assert found == TowerSizes(width=1280, inner=3420, layers=32, windowed=28, side=8)
    assert TowerSizes.of(None) == TowerSizes()


def test_two_ranks_have_at_most_three_fifths_each():
    """Deal eight images, from 224 x 224 to 1344 x 1008 pixels, to the tower of Qwen2.5-VL-7B on two ranks."""
    grids = [(1, 16, 16), (1, 72, 96), (1, 32, 24), (1, 48, 64), (1, 24, 40), (1, 72, 54), (1, 16, 90), (1, 40, 40)]
    sizes = TowerSizes.of(Qwen2_5_VLVisionConfig(hidden_size=1280))
    shares = dealt([sizes.cost(*grid) for grid in grids], 2)
    counts = {"cost": sizes.cost, "patches": lambda *grid: grid[0] * grid[1] * grid[2]}
    for count in counts.values():
        numbers = [count(*grid) for grid in grids]
        assert max(sum(numbers[item] for item in share) for share in shares) <= 0.6 * sum(numbers)
