"""Tests of messages through shared memory: their contents, how memory is used again, and ranks that end."""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
import torch.distributed as dist

from hf_context_parallel.distributed import shared_blocks, shared_memory
from hf_context_parallel.distributed.buffers import PATIENCE, keeping
from hf_context_parallel.distributed.mesh import world
from hf_context_parallel.distributed.messages import GroupExchange, new_landing, new_message
from hf_context_parallel.distributed.shared_blocks import OwnBlocks, has_no_memory
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


def random_rounds(rounds: int) -> tuple[int, int, int]:
    """Exchange random messages with all other ranks, and wait for them in random order, often some rounds later.

    Some are sent from memory that the exchange lends, and some are read where they lie. Both are held for some rounds.

    Returns:
        The number of messages that arrived, of those sent from lent memory, and of those read where they lie.
    """
    exchange, mine = make_exchange(world()), dist.get_rank()
    assert isinstance(exchange, SharedMemoryExchange)
    others, own = [rank for rank in range(dist.get_world_size()) if rank != mine], random.Random(mine)
    waiting, arrived, lent, landed, held = [], 0, 0, 0, []

    def sent(tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
        memory = exchange.lend([len(tensor)], tensor.dtype) if own.random() < 0.5 else None
        if memory is None:
            return tensor, False
        held.append((memory.copy_(tensor), tensor))
        return memory, True

    def messages(number: int, sender: int, receiver: int) -> list[torch.Tensor]:
        count = random.Random(repr((number, sender, receiver))).choice([0, 0, 1, 1, 2, 5])
        return [payload(number, sender, receiver, index) for index in range(count)]

    for number in range(rounds):
        made = [(peer, *sent(tensor)) for peer in others for tensor in messages(number, mine, peer)]
        sends = [(peer, tensor) for peer, tensor, _ in made]
        ordinary = [tensor for _, tensor, is_lent in made if not is_lent]
        lent += sum(is_lent for _, _, is_lent in made)
        expected = [(peer, tensor) for peer in others for tensor in messages(number, peer, mine)]
        receives = [
            (peer, torch.ones_like(tensor) if own.random() < 0.5 else new_landing(exchange, tensor, len(tensor)))
            for peer, tensor in expected
        ]
        posts = [(sends, receives)] if own.random() < 0.5 else own.sample([(sends, []), ([], receives)], 2)
        waiting += [
            (exchange.post(*post), ordinary if post[0] else [], post[1], expected if post[1] else []) for post in posts
        ]
        own.shuffle(waiting)
        while waiting and (number + 1 == rounds or own.random() < 0.6):
            pending, posted, received, truth = waiting.pop()
            in_place = [has_no_memory(tensor) for _, tensor in received] if truth else []
            pending.wait()
            for tensor in posted:
                tensor.fill_(0)
            assert all(same(tensor, right) for (_, tensor), (_, right) in zip(received, truth))
            held += [(tensor, right) for (_, tensor), (_, right), kept in zip(received, truth, in_place) if kept]
            arrived, landed = arrived + len(truth), landed + sum(in_place)
        while len(held) > 20 or (held and number + 1 == rounds):
            assert same(*held.pop(own.randrange(len(held))))
    return arrived, lent, landed


@pytest.mark.parametrize(
    "size, rounds",
    [(2, 150), (3, 60), (4, 60), *(pytest.param(size, 2000, marks=pytest.mark.exhaustive) for size in (2, 3, 4))],
)
def test_random_messages_arrive_as_they_were_sent(on_ranks, size, rounds):
    for arrived, lent, landed in on_ranks(size, random_rounds, rounds):
        assert arrived > rounds * (size - 1) and lent > arrived / 20 and landed > arrived / 4


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
    return exchange._own._made, len(exchange._own._blocks)


def test_memory_is_used_again(on_ranks):
    """Check that rounds of two messages take the memory of two rounds at most, since a rank is one round ahead."""
    sizes = [[400_000 + 1000 * (number % 50), 300_000] for number in range(200)]
    for made, left in on_ranks(2, memory_files, sizes):
        assert made <= 4 and left == made


def test_memory_that_is_far_too_large_is_released(on_ranks):
    for made, left in on_ranks(2, memory_files, [[2**24] * 3] + [[1000]] * (PATIENCE + 10)):
        assert made >= 4 and left <= 2


def resident_of_others() -> int:
    """Bytes of the memory of other ranks that is resident in this process."""
    found, of_others = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as maps:
        for line in maps:
            name, value = line.split()[:2]
            if "-" in name:
                of_others = value == "r--s" and "/memfd:hf_context_parallel" in line
            elif name == "Rss:" and of_others:
                found += 1024 * int(value)
    return found


def layers(count: int) -> tuple[int, int, int, int]:
    """Send tensors in lent memory forth, and again when all were sent, as layers do in forward and backward.

    Returns:
        The memory files that were made, those that are open, the places where messages were read, and the most bytes
        of the other rank's memory that were resident here.
    """
    exchange, peer = make_exchange(world()), 1 - dist.get_rank()
    like, saved, addresses, resident = torch.empty(0), [], set(), resident_of_others()
    for number in range(count):
        keys = new_message(exchange, like, 300, 400).fill_(number + peer)
        saved.append(keys)
    for number in [*range(count), *reversed(range(count))]:
        received = new_landing(exchange, like, 100, 400)
        exchange.post([(peer, saved[number][100:200])], [(peer, received)]).wait()
        assert (received == number + 1 - peer).all() and received.is_contiguous()
        addresses.add(received.data_ptr())
    most = resident_of_others() - resident
    open_files = len(shared_blocks._open_blocks & set(exchange._own._blocks.values()))
    dist.barrier()
    saved.clear()
    del keys, received
    for _ in range(3 * count):  # in memory that the layers had
        keys = new_message(exchange, like, 300, 400).fill_(7)
        exchange.post([(peer, keys)], [(peer, new_landing(exchange, like, 300, 400))]).wait()
    return exchange._own._made, open_files, len(addresses), most


def test_layers_send_without_a_copy_what_they_save(on_ranks):
    """Check also that what the layers of another rank have saved does not add up in the memory of this one."""
    for made, open_files, places, most in on_ranks(2, layers, 10):
        assert made <= 13 and open_files == 0 and places == 10
        assert 100 * 400 * 4 <= most <= 3 * 100 * 400 * 4


def resident_files() -> int:
    """Bytes of memory files of any rank that are resident in this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("RssShmem:")[1].split()[0])


def resident_after_messages(kept: bool, size: int) -> list[int]:
    """Exchange numbers in lent memory, in memory that is copied, and with a tensor that is copied out.

    Returns:
        Bytes of files that are resident beside those before: while a message is there, and when it is gone.
    """
    exchange, peer, found = make_exchange(world()), 1 - dist.get_rank(), []
    like, before = torch.empty(0), resident_files()
    for number in range(6):
        with keeping(kept):
            lends, copies = number % 2 == 0, number % 3 == 0
            sent = (new_message(exchange, like, size) if lends else torch.empty(size)).fill_(number + peer)
            received = torch.empty(size) if copies else new_landing(exchange, like, size)
            exchange.post([(peer, sent)], [(peer, received)]).wait()
            assert (received == number + 1 - peer).all()
            found.append(resident_files() - before)
            del sent, received
        dist.barrier()
        # What was read is said, and heard, with the next message.
        for _ in range(2):
            exchange.post([(peer, torch.ones(1))], [(peer, torch.empty(1))]).wait()
            dist.barrier()
        found.append(resident_files() - before)
    return found


def test_memory_that_is_not_kept_is_given_back(on_ranks):
    size = 2**20
    for found in on_ranks(2, resident_after_messages, False, size):
        assert min(found[2 * number] for number in (1, 2, 4, 5)) >= 4 * size  # where a tensor lies in what was sent
        assert max(found[1::2]) < size
    for found in on_ranks(2, resident_after_messages, True, size):
        assert min(found[1::2]) >= 4 * size


def holding(rounds: int) -> bool:
    """Hold what the first round brought while memory is used again in many others."""
    exchange, peer = make_exchange(world()), 1 - dist.get_rank()
    like, held = torch.empty(0), []
    for number in range(rounds):
        keys = new_message(exchange, like, 50_000).fill_(number)
        received = new_landing(exchange, like, 50_000)
        exchange.post([(peer, keys)], [(peer, received)]).wait()
        held += [keys, received] if number == 0 else []
    dist.barrier()
    return exchange._own._made <= 5 and all((tensor == 0).all() for tensor in held)


def test_memory_is_not_used_again_while_a_tensor_of_any_rank_lies_in_it(on_ranks):
    assert on_ranks(2, holding, 2 * PATIENCE) == [True, True]


def test_few_files_are_open(monkeypatch):
    """Check that tensors get ordinary memory when many files wait for ranks that have not mapped them."""
    monkeypatch.setattr(shared_blocks, "MOST_OPEN", 3)
    gc.collect()
    monkeypatch.setattr(shared_blocks, "_open_blocks", WeakSet())
    blocks, before = OwnBlocks([1, 2]), len(os.listdir("/proc/self/fd"))
    lent = [blocks.lend([100_000], torch.float32) for _ in range(5)]
    assert [tensor is None for tensor in lent] == [False, False, False, True, True]
    assert blocks.lend([10], torch.float32) is None  # it is copied in less time
    for rank in (1, 2):
        os.close(blocks.holding(lent[0], 1)[0].descriptor_for(rank))
    assert blocks.holding(lent[0], 1)[0].descriptor_for(1) is None
    assert len(os.listdir("/proc/self/fd")) == before + 2
    assert blocks.lend([100_000], torch.float32) is not None
    monkeypatch.setattr(shared_blocks, "MOST_OPEN", 100)
    monkeypatch.setattr(os, "memfd_create", lambda name: os.open("/nowhere", os.O_RDONLY))
    assert blocks.lend([1_000_000], torch.float32) is None
    del lent, blocks
    assert len(os.listdir("/proc/self/fd")) == before


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


@pytest.mark.parametrize("floods", [False, True])
def test_messages_that_are_left_when_their_sender_is_gone(beside, floods):
    """Check that the error names the rank, where it is to be told that many were read, and packets are queued."""

    def child(exchange: SharedMemoryExchange) -> None:
        for _ in range(40):
            exchange.post([(0, torch.ones(40_000))], [])
        os.read(go[0], 1)  # it ends without taking any

    go = os.pipe()
    exchange, process = beside(child)
    held = []
    for _ in range(40):
        held.append(new_landing(exchange, torch.empty(0), 40_000))
        exchange.post([], [(1, held[-1])]).wait()
    pending = [exchange.post([(1, torch.zeros(1))], []) for _ in range(1500 if floods else 0)]
    os.write(go[1], b"x")
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert all((tensor == 1).all() for tensor in held)
    held.clear()
    with pytest.raises(dist.DistNetworkError, match="rank 1 of the group closed its connection"):
        pending[-1].wait() if floods else exchange.post([(1, torch.zeros(1))], [])


def test_a_message_of_evaluation_may_be_waited_for_later(beside):
    """Check it outside inference mode, as when ranks settle after an error."""
    exchange, _ = beside(lambda exchange: exchange.post([(0, torch.ones(40_000))], []).wait())
    with torch.inference_mode():
        received = new_landing(exchange, torch.empty(0), 40_000)
        pending = exchange.post([], [(1, received)])
    pending.wait()
    assert (received == 1).all()


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
    assert exchange._own._made == 1


def echo_in_place(exchange: SharedMemoryExchange) -> None:
    for _ in range(8):
        received = new_landing(exchange, torch.empty(0), 2, 50_000)
        exchange.post([], [(0, received)]).wait()
        exchange.post([(0, received + 1)], []).wait()


def test_memory_that_evaluation_was_lent_serves_training(beside):
    exchange, _ = beside(echo_in_place)
    like = torch.empty(0)
    for number in range(8):
        mode = torch.inference_mode if number % 2 else torch.enable_grad
        with mode():
            sent = new_message(exchange, like, 2, 50_000).fill_(number + 5.0)
            received = new_landing(exchange, like, 2, 50_000)
            exchange.post([(1, sent)], [(1, received)]).wait()
        assert (received == number + 6).all() and received.is_inference() == (mode is torch.inference_mode)
        del sent
    assert exchange._own._made <= 2  # the other rank says later that it has read the one before


def test_a_message_that_is_read_where_it_lies_cannot_be_written(beside):
    """Check that a process which tries ends, rather than change what the sender has saved."""

    def child(exchange: SharedMemoryExchange) -> None:
        received = new_landing(exchange, torch.empty(0), 100_000)
        exchange.post([], [(0, received)]).wait()
        faulthandler.disable()  # this error is expected
        received.add_(1)

    exchange, process = beside(child)
    keys = new_message(exchange, torch.empty(0), 100_000).fill_(1)
    exchange.post([(1, keys)], [])
    assert os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT).si_status == signal.SIGSEGV
    assert (keys == 1).all()


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
    """Count sockets, memory files and mappings of messages: before a context, while it is used, when it is dropped."""
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
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return found + sum("/memfd:hf_context_parallel" in line for line in maps)


def test_sockets_and_memory_go_with_their_group(on_ranks):
    for before, used, after in on_ranks(2, sockets_left):
        assert used >= before + 3 and after <= before  # a socket, and memory each way
