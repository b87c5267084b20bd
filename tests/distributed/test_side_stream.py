"""Tests of CUDA streams, simulated on the CPU.

No tensor is used or freed before the work that it depends on is done. Kernels wait only for their keys."""

import threading
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hf_context_parallel.attention import ring
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.compat import tree_leaves
from hf_context_parallel.distributed import side_stream
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, whole_rows
from hf_context_parallel.planning.plan import build_plan
from tests.helpers.ring import MASKS, on_rank, tensors
from tests.helpers.simulated import SimulatedExchange, run

KERNELS, SUMS, NETWORK = "kernels", "sums", "network"


class Stream:
    """Simulated stream of a rank's device.

    `known[other]` is the count of events of `other` that are surely done before the next work of this stream.
    """

    def __init__(self, name: str):
        self.name, self.device = name, None
        self.known: Counter[str] = Counter()

    def record_event(self) -> Counter[str]:
        return self.known.copy()

    def wait_event(self, event: Counter[str]) -> None:
        self.known |= event

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Uses:
    """Uses of a piece of memory: the stream that allocated it, and the last use of its elements by each stream.

    `last[first element, last element, stream, writes]` is the count of that stream's events at the use.
    """

    def __init__(self, storage, owner: str):
        self.reference, self.owner = StorageWeakRef(storage), owner
        self.last: dict[tuple[int, int, str, bool], int] = {}


class Device(TorchDispatchMode):
    """Device that follows the work that its thread queues on streams.

    It raises if two streams use a tensor without an order between them, and one of them writes. It also raises if
    memory returns to the stream that allocated it while another stream may still use it.
    """

    here = threading.local()

    def __init__(self):
        super().__init__()
        self.streams = {name: Stream(name) for name in (KERNELS, SUMS, NETWORK)}
        self.current = self.streams[KERNELS]
        self.quiet = False
        self._uses: dict[int, Uses] = {}

    def __enter__(self):
        self.here.device = self
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.quiet:
            self._follow(function, args, kwargs or {}, result)
        return result

    def _follow(self, function, args, kwargs, result) -> None:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        names = function._schema.arguments
        changed = [
            value
            for argument, value in [*zip(names, args), *((a, kwargs[a.name]) for a in names if a.name in kwargs)]
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        own = {x.untyped_storage()._cdata for x in given}
        new = [x for x in made if x.untyped_storage()._cdata not in own]
        if not new and not changed and made:  # views
            return
        for x in given:
            if not any(x is y for y in changed):
                self.use(x, self.current)
        for x in (*changed, *new):
            self.use(x, self.current, writes=True)

    def use(self, tensor: torch.Tensor, stream: Stream, writes: bool = False) -> None:
        self.look_for_freed()
        if not tensor.numel():
            return
        storage = tensor.untyped_storage()
        uses = self._uses.setdefault(storage._cdata, Uses(storage, self.current.name))
        first = tensor.storage_offset()
        last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        for (start, end, other, wrote), when in uses.last.items():
            if (writes or wrote) and start <= last and first <= end:
                assert stream.known[other] >= when, f"{stream.name} uses what {other} may still be using"
        stream.known[stream.name] += 1
        uses.last[first, last, stream.name, writes] = stream.known[stream.name]

    def look_for_freed(self) -> None:
        for key, uses in list(self._uses.items()):
            if uses.reference.expired():
                del self._uses[key]
                for (_, _, other, _), when in uses.last.items():
                    known = self.streams[uses.owner].known[other]
                    assert known >= when, f"freed for {uses.owner} while {other} may still be using it"


class StreamedExchange:
    """Messages of a rank in the order of NCCL's process group.

    They run on a stream of their own. It waits for the stream that is current when they are posted. The stream that is
    current in `wait` waits for it.
    """

    def __init__(self, exchange: SimulatedExchange, device: Device):
        self.rank, self._exchange, self._device = exchange.rank, exchange, device
        self.posts: list[int] = []
        """Count of events of the network's stream after each post."""

    def post(self, sends: Sequence, receives: Sequence):
        device, network = self._device, self._device.streams[NETWORK]
        if sends or receives:
            network.wait_stream(device.current)
        for messages, writes in ((sends, False), (receives, True)):
            for _, tensor in messages:
                device.use(tensor, network, writes)
        self.posts.append(network.known[NETWORK])
        device.quiet = True
        pending = self._exchange.post(sends, receives)
        device.quiet = False
        return StreamedPending(pending, device, network.record_event() if sends or receives else Counter())


class StreamedPending:
    def __init__(self, pending, device: Device, done: Counter[str]):
        self._pending, self._device, self._done = pending, device, done

    def wait(self) -> None:
        self._device.quiet = True
        self._pending.wait()
        self._device.quiet = False
        self._device.current.wait_event(self._done)
        self._pending = None
        self._device.look_for_freed()


class Watched:
    """Kernel that records, at each call, the messages that are surely done."""

    def __init__(self, kernel, device: Device):
        self._kernel, self._device = kernel, device
        self.known: list[int] = []

    def forward(self, *args):
        return self._called(self._kernel.forward, *args)

    def backward(self, *args):
        return self._called(self._kernel.backward, *args)

    def _called(self, function, *args):
        self.known.append(self._device.streams[KERNELS].known[NETWORK])
        return function(*args)


class on_stream:
    """Stand-in for `torch.cuda.stream`."""

    def __init__(self, stream: Stream):
        self._stream = stream

    def __enter__(self):
        device = Device.here.device
        self._before, device.current = device.current, self._stream

    def __exit__(self, *raised):
        Device.here.device.current = self._before


@pytest.fixture
def streams(monkeypatch):
    """Fixture that gives ranks the streams of a simulated CUDA device."""
    monkeypatch.setattr(ring, "GradientStream", lambda device: side_stream.GradientStream(torch.device("cuda", 0)))
    monkeypatch.setattr(side_stream, "_beside", lambda device: Device.here.device.streams[SUMS])
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Device.here.device.current)


def followed(mask, size, way=("p2p", 1)):
    """Run forward and backward with simulated streams, and return the messages and kernel calls of each rank."""
    layout, whole = zigzag(mask.length, size), tensors(mask, dtype=torch.float32)

    def work(exchange):
        with Device() as device:
            streamed = StreamedExchange(exchange, device)
            kernel = Watched(choose_kernel("cpu", "cpu"), device)
            results = on_rank(streamed, layout, mask, whole, kernel, way=way)
            device.look_for_freed()
        assert all(x.isfinite().all() for x in results)
        return exchange.rank, streamed, kernel

    return run(size, work)


@pytest.mark.parametrize("way", [("p2p", 1), ("all_gather", 1), ("a2a+p2p", 2)], ids=lambda way: way[0])
@pytest.mark.parametrize("name", ["one document", "longer than a shard", "window"])
def test_streams_wait_for_each_other_where_they_must(name, way, streams):
    followed(MASKS[name], 4, way)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("size", [2, 5])
def test_kernels_wait_for_their_keys_alone(size, beside, streams, monkeypatch):
    """Check that kernels wait for no keys or sums of gradients that they do not need.

    With a single stream, sums of gradients would delay kernels if there are more than two steps.
    """
    if not beside:
        monkeypatch.setattr(ring, "GradientStream", side_stream.GradientStream)
    mask, held_up = Mask(16 * size, whole_rows(1, 16 * size)), False
    for rank, exchange, kernel in followed(mask, size):
        plan = build_plan(zigzag(mask.length, size), mask, rank)
        posts, expected = iter(exchange.posts), []
        for backward in (False, True):
            keys = None
            for number, step in enumerate(plan.steps):
                expected += [keys] * len(step.calls)
                keys = next(posts, None) if number + 1 < size else None
                before = plan.steps[number - 1] if backward and number else None
                if before and (before.grad_sends or before.grad_returns or step.grad_receives):
                    next(posts)  # sums of gradients
        assert len(expected) == len(kernel.known)
        held_up |= any(known != must for known, must in zip(kernel.known, expected) if must)
    assert held_up is (not beside and size > 2)


@pytest.mark.parametrize(
    "method, message",
    [("follow", "may still be using"), ("keep", "freed for kernels"), ("join", "may still be using")],
)
def test_it_would_be_noticed(method, message, streams, monkeypatch):
    """Break the gradient stream: it does not wait, does not keep tensors, or is not waited for."""
    monkeypatch.setattr(side_stream.GradientStream, method, lambda *args: None)
    with pytest.raises(AssertionError, match=message):
        followed(MASKS["one document"], 3)


def test_without_cuda_a_gradient_stream_does_nothing():
    stream = side_stream.GradientStream(torch.device("cpu"))
    with stream:
        stream.follow()
        stream.keep(torch.zeros(1))
    stream.join()
    assert not any(isinstance(value, torch.Tensor) for value in vars(stream).values())
