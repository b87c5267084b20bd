"""Tests of the order of events, the messages and the buffers of ranks in a simulated ring."""

import weakref
from itertools import count

import pytest
import torch

from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.distributed import messages as exchanges
from hf_context_parallel.planning.layout import contiguous, zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows
from hf_context_parallel.planning.plan import build_plan
from tests.helpers.ring import MASKS, SIZES, on_rank, tensors
from tests.helpers.simulated import Event, LiveBuffers, Log, run


def watch(layout, mask, whole):
    """Run a forward and a backward pass, and return the plan and the log of each rank."""

    def watched(exchange):
        log = Log()
        on_rank(log.exchange(exchange), layout, mask, whole, log.kernel(choose_kernel("cpu", "cpu")))
        return build_plan(layout, mask, exchange.rank), log

    return run(layout.size, watched)


def overlapping(plan):
    """Expected events, in which each transfer is posted before the kernel calls of a step and waited for after them.

    During a step the next keys travel. During a step of the backward, the gradients of the step before travel too.
    """
    posts, events = count(), []
    for backward in (False, True):
        for number in range(plan.size + backward):
            keys = [next(posts)] if number + 1 < plan.size else []
            gradients = [next(posts)] if backward and number else []
            calls = plan.steps[number].calls if number < plan.size else ()
            events += [Event("post", post) for post in keys + gradients]
            events += [Event("kernel")] * len(calls)
            events += [Event("wait", post) for post in gradients + keys]
    return events


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["one document", "longer than a shard", "bidirectional"])
def test_transfers_overlap_with_kernel_calls(name, size):
    mask = MASKS[name]
    for plan, log in watch(zigzag(mask.length, size), mask, tensors(mask)):
        assert log.events == overlapping(plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["one document", "longer than a shard", "hundreds of tiny documents", "window", "chunks"]
)
def test_bytes_sent_are_the_plans(name, size, dtype):
    """Check that keys/values travel in their own dtype in both passes, and sums of gradients in float32."""
    mask, key_heads, dim, value_dim = MASKS[name], 2, 8, 4
    whole = tensors(mask, key_heads=key_heads, dim=dim, value_dim=value_dim, dtype=dtype)
    width = key_heads * (dim + value_dim)
    for plan, log in watch(zigzag(mask.length, size), mask, whole):
        assert log.bytes_sent(dtype) == 2 * plan.sent_keys * width * dtype.itemsize
        assert log.bytes_sent(torch.float32) == plan.sent_gradients * width * torch.float32.itemsize
        assert log.bytes_sent(dtype) + log.bytes_sent(torch.float32) == sum(log.sent.values())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", [zigzag, contiguous])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_only_the_halo_of_a_window_travels(size, layout, causal):
    """Check that at each boundary between ranks, window - 1 tokens travel, to their reader alone."""
    chunk = 6
    layout = layout(chunk * len(layout(1, size).chunk_owners), size)
    owners = layout.chunk_owners
    whole = tensors(Mask(layout.length, whole_rows(1, layout.length)), dtype=torch.bfloat16)
    for window in (1, 2, chunk, chunk + 1):
        halos = [[] for _ in owners[:size]]
        for chunk_before, (before, after) in enumerate(zip(owners, owners[1:])):
            if before != after:
                edge = (chunk_before + 1) * chunk
                halos[after] += range(edge - window + 1, edge)
                halos[before] += [] if causal else range(edge, edge + window - 1)
        mask = Mask(layout.length, whole_rows(1, layout.length), Pattern(causal, window))
        watched = watch(layout, mask, whole)
        for (plan, log), halo in zip(watched, halos):
            assert sum(step.tokens for step in plan.steps[1:]) == len(set(halo))
            assert sum(log.sent.values()) == log.bytes_sent(torch.bfloat16) + log.bytes_sent(torch.float32)
        width = 2 * (8 + 8)
        halo = sum(len(set(halo)) for halo in halos)
        assert sum(plan.sent_keys for plan, _ in watched) == halo
        assert sum(log.bytes_sent(torch.bfloat16) for _, log in watched) == 2 * halo * width * 2
        assert sum(log.bytes_sent(torch.float32) for _, log in watched) == halo * width * 4


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12])
def test_buffers_alive_at_a_time(size):
    """Check that at most three key/value buffers are alive, and five shards' sums of gradients, for any ring size."""
    tokens = 16
    mask = Mask(tokens * size, whole_rows(1, tokens * size))
    layout = zigzag(mask.length, size)
    whole = tensors(mask, key_heads=2, dim=8, value_dim=8, dtype=torch.bfloat16)

    def counted(exchange):
        with LiveBuffers((2, 16), torch.bfloat16) as keys, LiveBuffers((2, 16), torch.float32) as gradients:
            on_rank(exchange, layout, mask, whole, choose_kernel("cpu", "cpu"))
        return keys, gradients

    for keys, gradients in run(size, counted):
        assert 1 <= keys.most <= 3 and tokens <= keys.most_rows <= 3 * tokens
        assert tokens <= gradients.most_rows <= 5 * tokens


@pytest.mark.parametrize("way, together", [("all_gather", 1), ("p2p", 1), ("p2p", 3)])
def test_messages_do_not_grow_with_documents(way, together):
    """Check that 500 documents, each on all ranks, take 14 messages a pass and direction at most."""
    size, length = 8, 64
    layout, mask = zigzag(length, size), Mask(length, whole_rows(500, length))
    for rank in (0, 3):
        strategy = build_strategy(way, 1, layout, mask, rank, together)
        keys = [(*step.forwards, *step.direct_sends) for step in strategy.plan.steps]
        gradients = [step.grad_sends for step in strategy.plan.steps]
        received = [step.receives for step in strategy.plan.steps]
        for transfers in (keys, gradients, received):
            assert 1 <= sum(t.peer != rank for of_step in transfers for t in of_step) <= 14
    runs = [len(t.rows) for of_step in (*keys, *received) for t in of_step]
    assert max(runs) >= 500 or (together == 1 and way == "p2p")  # there, keys are read as they lie


@pytest.mark.parametrize("together, calls", [(1, 8), (2, 5), (3, 4)])
def test_steps_with_several_owners_take_fewer_calls(together, calls):
    """Check the kernel calls of a causal document on 8 ranks. Each but the first is merged."""
    layout, mask = zigzag(256, 8), Mask(256, whole_rows(1, 256))
    plans = [build_plan(layout, mask, rank, together=together) for rank in range(8)]
    assert {sum(len(step.calls) for step in plan.steps) for plan in plans} == {calls}
    assert {plan.pairs for plan in plans} == {256 * 257 // 2 // 8}


def test_a_process_groups_messages(monkeypatch):
    """Check that messages are posted at once and in order, and that buffers live just until `wait`."""
    posted, waited = [], []

    class Work:
        def wait(self):
            waited.append(self)

    monkeypatch.setattr(exchanges.dist, "P2POp", lambda operation, tensor, **where: (operation, tensor.shape, where))
    monkeypatch.setattr(exchanges.dist, "batch_isend_irecv", lambda operations: posted.append(operations) or [Work()])
    exchange = exchanges.GroupExchange("group")
    exchange.post([], []).wait()
    assert not posted  # batch_isend_irecv raises if it gets no operations
    buffers = [torch.zeros(count) for count in (1, 2, 3)]
    pending = exchange.post(sends=[(4, buffers[0]), (5, buffers[1])], receives=[(6, buffers[2])])
    isend, irecv = exchanges.dist.isend, exchanges.dist.irecv
    assert posted == [
        [
            (operation, (count,), {"group": "group", "group_peer": peer})
            for operation, count, peer in ((isend, 1, 4), (isend, 2, 5), (irecv, 3, 6))
        ]
    ]
    alive = [weakref.ref(buffer) for buffer in buffers]
    buffers.clear()
    assert all(buffer() is not None for buffer in alive) and not waited
    pending.wait()
    assert all(buffer() is None for buffer in alive) and len(waited) == 1
