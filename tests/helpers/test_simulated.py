"""Tests of the simulated group, its log and its modes: they must find the errors that they are made for."""

import threading

import pytest
import torch

from tests.helpers.simulated import LiveBuffers, run


def test_a_simulated_group_raises_what_the_first_rank_does():
    def function(exchange):
        if exchange.rank == 2:
            raise KeyError("on rank 2")
        exchange.post([], [((exchange.rank + 1) % 3, torch.empty(1))]).wait()

    with pytest.raises(KeyError, match="on rank 2"):
        run(3, function)


def test_a_simulated_group_waits_no_longer_than_it_should():
    with pytest.raises(TimeoutError, match="never came"):
        run(2, lambda exchange: exchange.post([], [(1 - exchange.rank, torch.empty(1))]).wait(), patience=0.1)
    with pytest.raises(TimeoutError, match="longer than"):
        run(1, lambda exchange: threading.Event().wait(3), patience=0.1)


def test_a_simulated_group_notices_misuse():
    """Errors: a buffer overwritten too early, an unreceived message, a wrong shape, and a buffer read too early."""

    def exchanging(sent, received, meanwhile=lambda sent, received: None):
        def function(exchange):
            out, into = torch.ones(sent), torch.ones(received)
            peer = 1 - exchange.rank
            pending = exchange.post([(peer, out)], [(peer, into)] if received else [])
            meanwhile(out, into)
            pending.wait()
            return into

        return run(2, function)

    assert all(into.equal(torch.ones(3)) for into in exchanging(3, 3))
    exchanging(3, 3, lambda sent, received: [] if received.isnan().all() else pytest.fail("it came at once"))
    with pytest.raises(AssertionError, match="changed before its send was waited for"):
        exchanging(3, 3, lambda sent, received: sent.zero_())
    with pytest.raises(AssertionError, match="does not fit"):
        exchanging(3, 4)
    with pytest.raises(AssertionError, match="nobody received"):
        exchanging(3, 0)


def test_live_buffers_are_counted_once_each():
    with LiveBuffers((2,), torch.float32) as buffers:
        first = torch.zeros(5, 2)
        view = first[1:]
        torch.zeros(3, 2)
        assert (buffers.most, buffers.most_rows) == (2, 8)
        del first
        second, *_ = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 1, 2)
    assert (buffers.most, buffers.most_rows) == (2, 8) and len(view) + len(second) == 7
