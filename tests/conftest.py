"""Fixtures of the whole suite."""

import os

import pytest

WORKERS = 4
TIMEOUT = 120
"""Seconds that a task may take before the suite gives up on it."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on real process groups."""
    for item in items:
        if "on_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session")
def on_ranks():
    """`on_ranks(n, function, *args)`: what the function returns on each of n ranks of a real process group."""
    from hf_context_parallel.distributed.worker_pool import WorkerPool

    workers = WorkerPool(WORKERS, TIMEOUT)
    yield workers
    workers.close()
