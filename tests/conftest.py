"""Fixtures of the whole suite."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def on_ranks():
    """`on_ranks(n, function, *args)`: what the function returns on each of n ranks of a real process group."""
    from pool import WorkerPool

    workers = WorkerPool()
    yield workers
    workers.close()
