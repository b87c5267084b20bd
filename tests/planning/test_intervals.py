"""Tests of intervals, compared with Python's sets."""

from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.planning.intervals import difference, intersection, total, union

intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=10)


def members(pairs):
    return {member for start, stop in pairs for member in range(start, stop)}


def canonical(numbers):
    """Convert a set of integers to its sorted, disjoint, non-touching intervals."""
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    stops = sorted(number + 1 for number in numbers if number + 1 not in numbers)
    return list(zip(starts, stops))


@given(intervals, intervals)
def test_intervals_are_sets(left, right):
    left_set, right_set = members(left), members(right)
    assert union(left) == canonical(left_set)
    assert union([*left, *right]) == canonical(left_set | right_set)
    assert intersection(union(left), union(right)) == canonical(left_set & right_set)
    assert difference(union(left), union(right)) == canonical(left_set - right_set)
    assert total(union(left)) == len(left_set)
