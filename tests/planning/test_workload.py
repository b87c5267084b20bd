"""Tests of workloads: the counts equal those of plans."""

from hypothesis import given

from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.planning.intervals import total, union
from hf_context_parallel.planning.workload import workload
from tests.helpers.simulated import cases


@given(cases())
def test_the_workload_is_that_of_plans(case):
    layout, mask = case
    counted = workload(layout, mask)
    plans = [build_strategy("p2p", 1, layout, mask, rank).plan for rank in range(layout.size)]
    if all(len(document) == 1 for row in mask.rows for document in row):  # there is no padding inside of documents
        assert list(counted.pairs) == [plan.pairs for plan in plans]
    assert list(counted.read) == [sum(step.tokens for step in plan.steps[1:]) for plan in plans]
    assert list(counted.owners) == [sum(step.tokens > 0 for step in plan.steps[1:]) for plan in plans]
    for merged, plan in zip(counted.merged, plans):
        steps = (union(run for call in step.calls for run in call.query_runs) for step in plan.steps[1:])
        assert merged == sum(map(total, steps))
    assert sum(counted.tokens) == sum(stop - start for row in mask.rows for d in row for start, stop in d)
