"""Fixtures of the whole suite."""

import os

import pytest

WORKERS = 4
TIMEOUT = 120
"""Timeout in seconds for a function on the ranks of the suite."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run on real process groups."""
    for item in items:
        if "on_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session")
def on_ranks():
    """Fixture `on_ranks(n, function, *args)`, which returns the function's result on each of n ranks.

    The ranks are processes of a real process group.
    """
    from hf_context_parallel.distributed.worker_pool import WorkerPool

    workers = WorkerPool(WORKERS, TIMEOUT)
    yield workers
    workers.close()
