"""Tests of the worker pool: it survives workers that die."""

import os

import pytest


def test_a_pool_starts_anew_after_a_worker_died(on_ranks):
    before = on_ranks(2, os.getpid)
    with pytest.raises(AssertionError, match="the process died"):
        on_ranks(1, os._exit, 5)
    after = on_ranks(2, os.getpid)
    assert len({*before, *after}) == 4
