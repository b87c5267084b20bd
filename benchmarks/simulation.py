"""Exchanges that need no process group: the ranks of a group in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from hf_context_parallel.attention.exchange import Message, Pending

Result = TypeVar("Result")
PATIENCE = 120  # seconds until a message that nobody sent is an error


class ThreadGroup:
    """A group whose ranks are threads, for results.

    CUDA work of all ranks goes to one stream, so it is done in the order in which it was asked for: a message is
    complete when its receiver copies it.
    """

    def __init__(self, size: int):
        self._size = size

    def run(self, work: Callable[[int, ThreadExchange], Result]) -> list[Result]:
        """What `work(rank, exchange)` returns for each rank, all running at once."""
        messages: dict[tuple[int, int, int], Future] = {}  # by sender, receiver and number

        def start(rank):
            # Backward must run in the rank's own thread: in autograd's, one a device, ranks would wait for each other.
            with torch.autograd.set_multithreading_enabled(False):
                return work(rank, ThreadExchange(rank, messages))

        with ThreadPoolExecutor(self._size) as pool:
            return list(pool.map(start, range(self._size)))


class ThreadExchange:
    """One rank's messages to the other threads of a group."""

    def __init__(self, rank: int, messages: dict[tuple[int, int, int], Future]):
        self._rank = rank
        self._messages = messages
        self._posted: Counter[tuple[int, int]] = Counter()

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        for peer, tensor in sends:
            # A copy, since the sender may overwrite the tensor once it has waited, which here is at once.
            self._next(self._rank, peer).set_result(tensor.clone())
        return Pending([_Arrival(self._next(peer, self._rank), tensor) for peer, tensor in receives])

    def _next(self, sender: int, receiver: int) -> Future:
        """The next message between two ranks, which either of them may ask for first."""
        self._posted[sender, receiver] += 1
        return self._messages.setdefault((sender, receiver, self._posted[sender, receiver]), Future())


class _Arrival:
    """A message to be copied into `tensor` when it is waited for."""

    def __init__(self, message: Future, tensor: torch.Tensor):
        self._message = message
        self._tensor = tensor

    def wait(self) -> None:
        self._tensor.copy_(self._message.result(timeout=PATIENCE))


class PreparedExchange:
    """Messages that are already there, for timing one rank without any other.

    Every message is the beginning of `stock`, `[tokens, ...]`: the numbers are wrong, and as fast to compute with as
    the right ones.
    """

    def __init__(self, stock: torch.Tensor):
        self._stock = stock

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        for _, tensor in receives:
            tensor.copy_(self._stock[: len(tensor)])
        return Pending()
