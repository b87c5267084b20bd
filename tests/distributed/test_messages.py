"""Tests of the order of events, the messages and the buffers of ranks in a simulated ring."""

import weakref
from itertools import count
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.distributed import messages as exchanges
from hf_context_parallel.distributed.mesh import Ranks
from hf_context_parallel.distributed.messages import CheckedExchange, Subset, in_flight
from hf_context_parallel.planning.layout import contiguous, zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows
from hf_context_parallel.planning.plan import Step, build_plan
from tests.helpers.models import context, tiny_model, tokens
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
    Nothing is posted where nothing travels.
    """
    posts, events, steps = count(), [], [*plan.steps, Step(0, ())]
    for backward in (False, True):
        for number in range(plan.size + backward):
            here, upcoming, before = (steps[min(max(0, n), plan.size)] for n in (number, number + 1, number - 1))
            travels = bool(upcoming.receives or upcoming.forwards or upcoming.direct_sends)
            keys = [next(posts)] if travels else []
            returns = number > 0 and bool(before.grad_sends or before.grad_returns or here.grad_receives)
            gradients = [next(posts)] if backward and returns else []
            calls = here.calls
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


@pytest.mark.parametrize("size", [1, 2, 3, 8, pytest.param(12, marks=pytest.mark.exhaustive)])
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


class LateExchange:
    """Exchange whose messages arrive when the test delivers them, as those of NCCL do after the host has gone on."""

    def __init__(self):
        self.addresses: list[tuple[weakref.ref, int]] = []
        self.waited = 0

    def post(self, sends, receives):
        self.addresses += [weakref.ref(tensor.untyped_storage()) for _, tensor in receives]
        return exchanges.Pending([self], [tensor for _, tensor in (*sends, *receives)])

    def wait(self):
        self.waited += 1

    def alive(self) -> list[bool]:
        return [storage() is not None for storage in self.addresses]


def interrupted_step(exchange) -> None:
    """Receive two messages, wait for one of them, and run out of memory."""
    with pytest.raises(torch.OutOfMemoryError), in_flight(Subset(exchange, [1, 0])) as messages:
        messages.post([], [(0, torch.zeros(3))]).wait()
        messages.post([], [(0, torch.zeros(3))])
        raise torch.OutOfMemoryError


def test_memory_that_is_received_late_is_kept_until_all_has_arrived(monkeypatch):
    late = LateExchange()
    exchange = CheckedExchange(late, 2)
    interrupted_step(exchange)
    assert late.alive() == [False, True] and late.waited == 1
    with pytest.raises(RuntimeError, match="an error ended a step of this CP group while its messages"):
        exchange.post([], [])
    ranks = Ranks(None, 0, 2, torch.device("cpu"))
    counts = {"sent": [0, 0], "received": [0, 2]}, {"sent": [1, 0], "received": [0, 0]}
    by_rank = [[side["sent"][peer] for side in counts] for peer in range(2)]
    by_rank += [[side["received"][peer] for side in counts] for peer in range(2)]
    monkeypatch.setattr(exchanges, "gather_numbers", lambda ranks, *mine: by_rank)
    with pytest.raises(ValueError, match="rank 1 of the group has sent 1 messages to rank 0, which has received 2"):
        exchange.settle(ranks)
    assert exchange.interrupted and late.alive() == [False, True]
    by_rank[0][1] = 2  # the other rank has sent both
    exchange.settle(ranks)
    assert not exchange.interrupted and late.waited == 2 and late.alive() == [False, False]
    exchange.post([], []).wait()


def test_messages_of_an_unchecked_exchange_are_waited_for():
    late = LateExchange()
    interrupted_step(late)
    assert late.waited == 2 and late.alive() == [False, False]


def batch_after_an_error() -> list[torch.Tensor | str]:
    """Let the kernel raise on both ranks, and then run the batch again."""
    cp, model = context(), tiny_model("llama", "context_parallel")
    batch = {"input_ids": tokens(2, 33)}
    kernel = type(cp.group.kernel(batch["input_ids"].device))
    original, calls, found = kernel.forward, [], []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return original(self, *args)

    for _ in range(2):
        try:
            with patch.object(kernel, "forward", failing), cp.shard(batch, model) as local, torch.no_grad():
                found.append(cp.gather(model(**local).logits))
        except torch.OutOfMemoryError as error:
            found.append(str(error))
    return found


def test_a_batch_runs_after_an_error_of_all_ranks(on_ranks):
    with torch.no_grad():
        expected = tiny_model("llama", "sdpa")(input_ids=tokens(2, 33)).logits
    for error, logits in on_ranks(2, batch_after_an_error):
        assert error == "no memory"
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def left_over_message() -> list[str]:
    """Let both ranks fail, rank 0 after it has sent a message that rank 1 has not received."""
    cp, model = context(), tiny_model("llama", "context_parallel")
    batch, rank, found = {"input_ids": tokens(1, 16)}, dist.get_rank(), []
    sent = torch.arange(3.0)
    for step in range(3):
        try:
            with cp.shard(batch, model), in_flight(cp.exchange) as exchange:
                if step == 0:
                    exchange.post([(1, sent)] if rank == 0 else [], [])
                    raise KeyError("the disk is full")
        except (KeyError, ValueError) as error:
            found.append(str(error))
    left = torch.zeros(3)
    cp.exchange.carrier.post([], [] if rank == 0 else [(0, left)]).wait()  # past the check
    assert rank == 0 or left.equal(sent)  # the next step would have taken it for keys
    return found


def test_a_message_that_is_left_is_never_taken_for_one_of_the_next_step(on_ranks):
    for first, *later in on_ranks(2, left_over_message):
        assert first == "'the disk is full'" and len(later) == 2
        for message in later:
            assert "rank 0 of the group has sent 1 messages to rank 1, which has received 0" in message
