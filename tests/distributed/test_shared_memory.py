"""Tests of messages through shared memory: their contents, how memory is used again, and ranks that end."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hf_context_parallel.distributed import shared_memory
from hf_context_parallel.distributed.buffers import PATIENCE
from hf_context_parallel.distributed.mesh import world
from hf_context_parallel.distributed.messages import GroupExchange
from hf_context_parallel.distributed.shared_memory import SharedMemoryExchange, make_exchange
from tests.helpers.models import context

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64, torch.complex64, torch.uint8]
SIZES = [0, 1, 8, 1000, 4096, 4104, 70_001, 300_000]


def payload(*label: int) -> torch.Tensor:
    """Tensor of random bytes, dtype and size, which depend on the label alone."""
    draw = random.Random(repr(label))
    dtype, size = draw.choice(DTYPES), draw.choice(SIZES)
    size -= size % dtype.itemsize
    numbers = torch.frombuffer(bytearray(draw.randbytes(size)) or bytearray(1), dtype=torch.uint8)[:size]
    return numbers > 100 if dtype == torch.bool else numbers.view(dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def random_rounds(rounds: int) -> int:
    """Exchange random messages with all other ranks, and wait for them in random order, often some rounds later.

    Returns:
        The number of messages that arrived.
    """
    exchange, mine = make_exchange(world()), dist.get_rank()
    assert isinstance(exchange, SharedMemoryExchange)
    others, own = [rank for rank in range(dist.get_world_size()) if rank != mine], random.Random(mine)
    waiting, arrived = [], 0

    def messages(number: int, sender: int, receiver: int) -> list[torch.Tensor]:
        count = random.Random(repr((number, sender, receiver))).choice([0, 0, 1, 1, 2, 5])
        return [payload(number, sender, receiver, index) for index in range(count)]

    for number in range(rounds):
        sends = [(peer, tensor) for peer in others for tensor in messages(number, mine, peer)]
        expected = [(peer, tensor) for peer in others for tensor in messages(number, peer, mine)]
        receives = [(peer, torch.ones_like(tensor)) for peer, tensor in expected]
        posts = [(sends, receives)] if own.random() < 0.5 else own.sample([(sends, []), ([], receives)], 2)
        waiting += [(exchange.post(*post), *post, expected if post[1] else []) for post in posts]
        own.shuffle(waiting)
        while waiting and (number + 1 == rounds or own.random() < 0.6):
            pending, sent, received, truth = waiting.pop()
            pending.wait()
            for _, tensor in sent:
                tensor.fill_(0)
            assert all(same(tensor, right) for (_, tensor), (_, right) in zip(received, truth))
            arrived += len(truth)
    return arrived


@pytest.mark.parametrize(
    "size, rounds",
    [(2, 150), (3, 60), (4, 60), *(pytest.param(size, 2000, marks=pytest.mark.exhaustive) for size in (2, 3, 4))],
)
def test_random_messages_arrive_as_they_were_sent(on_ranks, size, rounds):
    assert min(on_ranks(size, random_rounds, rounds)) > rounds * (size - 1)


def memory_files(sizes: list[list[int]]) -> tuple[int, int]:
    """Send and receive messages of the given bytes in each round, and count the memory files.

    Returns:
        The files that were made in all rounds, and those that are left of them.
    """
    exchange, peer = make_exchange(world()), 1 - dist.get_rank()
    for number, sent in enumerate(sizes):
        sends = [(peer, torch.full((size,), (number + peer) % 251, dtype=torch.uint8)) for size in sent]
        receives = [(peer, torch.empty_like(tensor)) for _, tensor in sends]
        exchange.post(sends, receives).wait()
        assert all((tensor == (number + 1 - peer) % 251).all() for _, tensor in receives)
    (link,) = exchange._links.values()
    return link._made, len(link._sent) + len(link._idle._blocks)


def test_memory_is_used_again(on_ranks):
    """Check that rounds of two messages take the memory of two rounds at most, since a rank is one round ahead."""
    sizes = [[400_000 + 1000 * (number % 50), 300_000] for number in range(200)]
    for made, left in on_ranks(2, memory_files, sizes):
        assert made <= 4 and left == made


def test_memory_that_is_far_too_large_is_released(on_ranks):
    for made, left in on_ranks(2, memory_files, [[2**24] * 3] + [[1000]] * (PATIENCE + 10)):
        assert made >= 4 and left <= 2


def flood(count: int) -> bool:
    """Post far more messages to a peer than its socket holds packets, before it receives any."""
    exchange, mine = make_exchange(world()), dist.get_rank()
    peer = 1 - mine
    if mine == 1:
        dist.barrier()
    pending = [exchange.post([(peer, torch.tensor([number, mine]))], []) for number in range(count)]
    if mine == 0:
        assert exchange._links[peer].queue
        dist.barrier()
    received = [torch.empty(2, dtype=torch.int64) for _ in range(count)]
    pending += [exchange.post([], [(peer, tensor)]) for tensor in received]
    for posted in pending:
        posted.wait()
    dist.barrier()
    return all(tensor.tolist() == [number, peer] for number, tensor in enumerate(received))


def test_posting_waits_for_no_peer(on_ranks):
    assert on_ranks(2, flood, 1500) == [True, True]


Child = Callable[[SharedMemoryExchange], None]


@pytest.fixture
def beside() -> Iterator[Callable[..., tuple[SharedMemoryExchange, int]]]:
    """Fixture that forks rank 1, which calls a function with its exchange.

    It returns the exchange of rank 0, and the process of rank 1.
    """
    forks = []

    def start(child: Child, timeout: float = 60.0) -> tuple[SharedMemoryExchange, int]:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (here, there):
            end.setblocking(False)
        limit = timedelta(seconds=timeout)
        forks.append(os.fork())
        if not forks[-1]:
            try:
                here.close()
                child(SharedMemoryExchange({0: there}, GroupExchange(None), limit))
            finally:
                os._exit(0)
        there.close()
        return SharedMemoryExchange({1: here}, GroupExchange(None), limit), forks[-1]

    yield start
    for fork in forks:
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)


def die_beside_a_data_worker(exchange: SharedMemoryExchange) -> None:
    worker = os.fork()
    if not worker:
        signal.pause()
    exchange.post([(0, torch.tensor([worker]))], [])
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_is_noticed(beside):
    """Check that what it sent still arrives, and that a data worker which it forked does not hide its death."""
    exchange, _ = beside(die_beside_a_data_worker)
    worker = torch.zeros(1, dtype=torch.int64)
    exchange.post([], [(1, worker)]).wait()
    try:
        pending = exchange.post([], [(1, torch.empty(1))])
        with pytest.raises(dist.DistNetworkError, match="rank 1 of the group closed its connection"):
            pending.wait()
        with pytest.raises(dist.DistNetworkError, match="rank 1 of the group closed its connection"):
            exchange.post([(1, torch.zeros(1))], [])
    finally:
        os.kill(int(worker), signal.SIGKILL)


def test_what_a_rank_sent_before_it_ended_arrives(beside):
    """Check it where the rank leaves a packet unread, since the system then reports an error first."""

    def child(exchange: SharedMemoryExchange) -> None:
        exchange.post([(0, torch.full((5000,), 3.0)), (0, torch.full((5000,), 4.0))], []).wait()
        os.read(go[0], 1)  # until the other rank has sent something

    go = os.pipe()
    exchange, process = beside(child)
    received = torch.empty(2, 5000)
    exchange.post([(1, torch.zeros(10))], [(1, received[0])]).wait()
    os.write(go[1], b"x")
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    exchange.post([], [(1, received[1])]).wait()
    assert (received == torch.tensor([[3.0], [4.0]])).all()


def test_messages_to_a_rank_that_is_gone_end_with_an_error(beside):
    """Check that it is raised for messages that are queued, since the socket has no room for them."""

    def child(exchange: SharedMemoryExchange) -> None:
        os.read(go[0], 1)

    go = os.pipe()
    exchange, process = beside(child)
    pending = [exchange.post([(1, torch.zeros(1))], []) for _ in range(1500)]
    queued = len(exchange._links[1].queue)
    files = len(os.listdir("/proc/self/fd"))
    os.write(go[1], b"x")
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    for posted in (pending[-1], exchange):
        with pytest.raises(dist.DistNetworkError, match="rank 1 of the group closed its connection"):
            posted.wait() if posted is pending[-1] else posted.post([(1, torch.zeros(1))], [])
    assert queued and len(os.listdir("/proc/self/fd")) <= files - queued // 2


def echo(exchange: SharedMemoryExchange) -> None:
    received = torch.empty(2, 1000)
    for _ in range(2):
        exchange.post([], [(0, received)]).wait()
        exchange.post([(0, received + 1)], []).wait()


def test_memory_of_evaluation_serves_training(beside):
    exchange, _ = beside(echo)
    for number, mode in enumerate((torch.inference_mode, torch.enable_grad)):
        with mode():
            sent, received = torch.full((2, 1000), number + 5.0), torch.empty(2, 1000)
            exchange.post([(1, sent)], [(1, received)]).wait()
        assert (received == number + 6).all()
    assert exchange._links[1]._made == 1


def test_waiting_ends_with_the_timeout_of_the_process_group(beside):
    exchange, _ = beside(lambda exchange: signal.pause(), timeout=0.2)
    pending = exchange.post([], [(1, torch.empty(1))])
    with pytest.raises(dist.DistNetworkError, match=r"rank 1 of the group did not answer within 0\.2 s"):
        pending.wait()


def test_messages_of_another_size_are_refused(beside):
    exchange, _ = beside(lambda exchange: exchange.post([(0, torch.zeros(3))], []).wait())
    with pytest.raises(RuntimeError, match="rank 1 of the group sent 12 bytes where 8 were expected"):
        exchange.post([], [(1, torch.empty(2))]).wait()


def chosen(odd: int | None, step: str) -> tuple[str, float]:
    """Make the exchange of all ranks, where a step of connecting fails on one, and pass its rank around.

    Returns:
        The class of the exchange, and the rank before this one.
    """

    def fail(*args: object) -> None:
        raise ConnectionRefusedError

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == odd:
            patch.setattr(shared_memory, step, fail if step == "_call" else lambda size: None)
        exchange = make_exchange(world())
    size, received = dist.get_world_size(), torch.empty(1)
    mine = torch.full((1,), float(dist.get_rank()))
    exchange.post([((dist.get_rank() + 1) % size, mine)], [((dist.get_rank() - 1) % size, received)]).wait()
    return type(exchange).__name__, received.item()


@pytest.mark.parametrize("odd, step", [(None, "_call"), (1, "_listen"), (2, "_call")])
def test_all_ranks_share_memory_or_none(on_ranks, odd, step):
    name = "SharedMemoryExchange" if odd is None else "GroupExchange"
    assert on_ranks(3, chosen, odd, step) == [(name, 2.0), (name, 0.0), (name, 1.0)]


def sockets_left() -> list[int]:
    """Number of sockets and memory files of messages, before a context, while it is used, and when it is dropped."""
    gc.collect()
    counts = [in_use()]
    cp, q = context(), torch.randn(1, 2, 8, 4)
    cp.attention(q, q, q)
    counts.append(in_use())
    del cp
    gc.collect()
    return [*counts, in_use()]


def in_use() -> int:
    with open("/proc/net/unix", encoding="utf-8") as table:
        kinds = {f"socket:[{fields[6]}]": int(fields[4], 16) for fields in map(str.split, list(table)[1:])}
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            link = os.readlink(f"/proc/self/fd/{name}")
            found += kinds.get(link) == socket.SOCK_SEQPACKET or link.startswith("/memfd:hf_context_parallel")
    return found


def test_sockets_and_memory_go_with_their_group(on_ranks):
    for before, used, after in on_ranks(2, sockets_left):
        assert used >= before + 3 and after <= before  # a socket, and memory each way
