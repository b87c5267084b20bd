"""Tests of portions: what a row has had before a part, and whether it will have more."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.planning.intervals import union
from hf_context_parallel.planning.portions import portions_of

ROWS = 12
INTERVALS = st.tuples(st.integers(0, ROWS - 1), st.integers(1, ROWS)).filter(lambda run: run[0] < run[1])
RUNS = st.lists(INTERVALS, min_size=1, max_size=5).map(tuple)  # runs of a part may overlap


def numbers(runs):
    return [number for run in runs for number in range(*run)]


@given(st.lists(RUNS, max_size=5))
def test_every_row_of_every_part_once_in_order(parts):
    found = portions_of(parts, ROWS)
    times = np.zeros(ROWS, dtype=int)
    for runs in parts:
        np.add.at(times, numbers(runs), 1)
    assert found.complete == times.all() and found.most == times.max() and len(found.of_parts) == len(parts)
    met = np.zeros(ROWS, dtype=int)
    for runs, portions in zip(parts, found.of_parts):
        places = [number for portion in portions for number in numbers(portion.part)]
        assert sorted(places) == list(range(len(numbers(runs))))
        for part, rows, before, last in portions:
            held = np.array(numbers(rows))
            assert np.array(numbers(runs))[numbers(part)].tolist() == held.tolist()
            assert len(set(held)) == len(held) and len(held)
            assert (np.minimum(met[held], 2) == before).all()
            met[held] += 1
            assert ((met[held] == times[held]) == last).all()


def test_a_part_with_all_rows_is_one_portion():
    ((only,),) = portions_of([((0, ROWS),)], ROWS).of_parts
    assert only == (((0, ROWS),), ((0, ROWS),), 0, True)


@given(RUNS)
def test_runs_that_do_not_overlap_make_no_sum(runs):
    assert portions_of([tuple(union(runs))], ROWS).most == 1
