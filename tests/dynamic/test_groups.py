"""Tests of the sizes of groups."""

from __future__ import annotations

import pytest

from hf_context_parallel.dynamic.groups import sizes


@pytest.mark.parametrize(
    ("extent", "expected"),
    [(1, [1]), (8, [1, 2, 4, 8]), (6, [1, 2, 6]), (12, [1, 2, 4, 12]), (9, [1, 3, 9]), (5, [1, 5])],
)
def test_sizes_divide_each_other(extent, expected):
    assert sizes(extent) == expected
