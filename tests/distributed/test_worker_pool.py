"""Tests of the worker pool: it survives workers that die."""

import os

import pytest

from hf_context_parallel.distributed.worker_pool import WorkerPool


@pytest.mark.distributed
def test_a_pool_starts_anew_after_a_worker_died():
    pool = WorkerPool(1, 60)
    (before,) = pool(1, os.getpid)
    with pytest.raises(AssertionError, match="the process died"):
        pool(1, os._exit, 5)
    (after,) = pool(1, os.getpid)
    pool.close()
    assert before != after
