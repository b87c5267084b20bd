"""Fixtures of the whole suite."""

import gc
import os

import pytest

from tests.helpers.examples import QUICK

WORKERS = 4
TIMEOUT = 120
"""Timeout in seconds for a function on the ranks of the suite."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    """Mark the tests that run on real process groups, and with QUICK_TESTS=1 keep the first case of each test alone.

    Between the two, pytest selects by marks.
    """
    for item in items:
        if "on_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.distributed)
    yield
    if QUICK:
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
        items[:] = reversed(first.values())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let collections of garbage leave out what the tests have imported, which would take half a second of each."""
    gc.freeze()


@pytest.fixture(scope="session")
def on_ranks():
    """Fixture `on_ranks(n, function, *args)`, which returns the function's result on each of n ranks.

    The ranks are processes of a real process group.
    """
    from hf_context_parallel.distributed.worker_pool import WorkerPool

    workers = WorkerPool(WORKERS, TIMEOUT)
    yield workers
    workers.close()
