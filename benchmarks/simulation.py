"""Exchanges that need no process group: the ranks of a group in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch

from hf_context_parallel.distributed.messages import Message, Pending

Result = TypeVar("Result")
PATIENCE = 120  # seconds after which a message that nobody sent is an error


class ThreadGroup:
    """Group whose ranks are threads of one process. It checks results, not speed.

    On CUDA, the kernels of each rank run on a stream of their own. Messages run on another stream, as with NCCL's
    process group. They copy from the sender's memory to the receiver's, and only events order the streams. So memory
    that is used or freed too early changes the results.

    Args:
        delay: additional cycles of the device for each message, so that work that does not wait for it is early.
        apart: False puts everything on one stream, where no work can be early.
    """

    def __init__(self, size: int, delay: int = 0, apart: bool = True):
        self._size, self._delay, self._apart = size, delay, apart

    def run(self, work: Callable[[int, ThreadExchange], Result]) -> list[Result]:
        """Run `work(rank, exchange)` on all ranks at once, and return the results."""
        messages: dict[tuple[int, int, int], Future] = {}  # keyed by sender, receiver and number

        def start(rank):
            # Backward must run in the thread of the rank. In autograd's one thread for each device, ranks would block.
            own = _own_stream() if self._apart else nullcontext()
            with torch.autograd.set_multithreading_enabled(False), own:
                return work(rank, ThreadExchange(rank, messages, self._delay, self._apart))

        with ThreadPoolExecutor(self._size) as pool:
            return list(pool.map(start, range(self._size)))


@contextmanager
def _own_stream():
    """Use a stream of its own for a thread on CUDA, ordered after all earlier and before all later work."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.current_stream().synchronize()


class ThreadExchange:
    """Messages of one rank to the other threads of a group."""

    def __init__(self, rank: int, messages: dict[tuple[int, int, int], Future], delay: int, apart: bool = True):
        self._rank = rank
        self._messages = messages
        self._posted: Counter[tuple[int, int]] = Counter()
        self._network = _Network(delay, apart)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        works: list[_Arrival | _Departure] = []
        for peer, tensor in receives:
            works.append(_Arrival(self._next(peer, self._rank), tensor, self._network.ready(tensor), self._network))
        for peer, tensor in sends:
            taken: Future = Future()
            self._next(self._rank, peer).set_result((tensor, self._network.ready(tensor), taken))
            works.append(_Departure(taken))
        return Pending(works, [tensor for _, tensor in (*sends, *receives)])

    def _next(self, sender: int, receiver: int) -> Future:
        """Next message between two ranks. Either of them may ask for it first."""
        self._posted[sender, receiver] += 1
        return self._messages.setdefault((sender, receiver, self._posted[sender, receiver]), Future())


class _Network:
    """Stream on CUDA that copies each message when it is ready. On other devices messages are copied at once."""

    def __init__(self, delay: int = 0, apart: bool = True):
        self._delay, self._apart = delay, apart
        self._stream: torch.cuda.Stream | None = None

    @staticmethod
    def ready(tensor: torch.Tensor) -> torch.cuda.Event | None:
        """Event after all work that the current stream has queued so far."""
        return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def copy(self, target: torch.Tensor, source: torch.Tensor, *ready: torch.cuda.Event) -> torch.cuda.Event | None:
        """Copy a message when both sides are ready, and return the event of its end."""
        if not target.is_cuda:
            target.copy_(source)
            return None
        if self._stream is None:
            here = torch.cuda.current_stream(target.device)
            self._stream = torch.cuda.Stream(target.device, priority=-1) if self._apart else here
        for event in ready:
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            if self._delay:
                torch.cuda._sleep(self._delay)
            target.copy_(source)
            return self._stream.record_event()


class _Done:
    """Operation that the current stream waits for."""

    def __init__(self, event: torch.cuda.Event | None):
        self._event = event

    def wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class _Arrival:
    """Message to be copied into `tensor`."""

    def __init__(self, message: Future, tensor: torch.Tensor, ready: torch.cuda.Event | None, network: _Network):
        self._message, self._tensor, self._ready, self._network = message, tensor, ready, network

    def wait(self) -> None:
        source, ready, taken = self._message.result(timeout=PATIENCE)
        done = self._network.copy(self._tensor, source, self._ready, ready)
        taken.set_result(done)
        _Done(done).wait()


class _Departure:
    """Message that its receiver copies. A rank waits for arrivals first, since other ranks wait for those."""

    def __init__(self, taken: Future):
        self._taken = taken

    def wait(self) -> None:
        _Done(self._taken.result(timeout=PATIENCE)).wait()


class PreparedExchange:
    """Messages that are already there, to time one rank without other ranks.

    The bytes of each message are the first ones of `stock`, whose dtype is that of the computation. So values are
    wrong, but computing with them takes the same time. On CUDA messages are copied on a stream of their own, beside
    the kernels, at the speed of the device's memory. They occupy no multiprocessor for long. So the overlap that is
    measured here is the best possible.
    """

    def __init__(self, stock: torch.Tensor):
        self._stock = stock.flatten().view(torch.uint8)
        self._network = _Network()

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        works = [
            _Done(self._network.copy(tensor, self._prepared(tensor), self._network.ready(tensor)))
            for _, tensor in receives
        ]
        return Pending(works, [tensor for _, tensor in (*sends, *receives)])

    def _prepared(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take as many bytes of the stock as `tensor` has. The stock is enlarged if it has fewer."""
        size = tensor.numel() * tensor.itemsize
        if size > len(self._stock):
            self._stock = self._stock.repeat(-(-size // len(self._stock)))
        return self._stock[:size].view(tensor.dtype).view(tensor.shape)
