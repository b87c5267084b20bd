"""Fixtures of the whole suite."""

import os
from collections import defaultdict

import pytest

from tests.helpers.examples import QUICK

WORKERS = 4
MOST_CASES = 2
"""Parametrised cases of a test function that run with QUICK_TESTS=1."""
TIMEOUT = 120
"""Timeout in seconds for a function on the ranks of the suite."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that run on real process groups, and with QUICK_TESTS=1 leave out most cases of each test."""
    for item in items:
        if "on_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.distributed)
    if QUICK:
        cases = defaultdict(list)
        for item in items:
            cases[item.nodeid.partition("[")[0]].append(item)
        kept = {case for of_one in cases.values() for case in of_one[:: -(-len(of_one) // MOST_CASES)]}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def on_ranks():
    """Fixture `on_ranks(n, function, *args)`, which returns the function's result on each of n ranks.

    The ranks are processes of a real process group.
    """
    from hf_context_parallel.distributed.worker_pool import WorkerPool

    workers = WorkerPool(WORKERS, TIMEOUT)
    yield workers
    workers.close()
