"""Helpers of the attention tests: a CP group simulated in one process, masks of every kind, and dense attention."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.compat import tree_leaves
from hf_context_parallel.distributed.messages import Message as Buffer
from hf_context_parallel.distributed.shared_blocks import has_no_memory
from hf_context_parallel.planning.intervals import intersection
from hf_context_parallel.planning.layout import FIXED_LAYOUTS, Layout
from hf_context_parallel.planning.mask import Mask, Pattern, from_attention_mask, from_cu_seqlens
from hf_context_parallel.planning.tiles import Band

torch.set_num_threads(1)  # ranks are threads, and tensors are small


class Message(NamedTuple):
    """Copy of a tensor that travels between ranks."""

    shape: torch.Size
    dtype: torch.dtype
    content: torch.Tensor
    """Bytes of the tensor."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Message:
        return cls(tensor.shape, tensor.dtype, tensor.view(torch.uint8).clone())


Label = tuple[int, int, int]
"""Sender, receiver, and the number of messages that the sender posted to the receiver before."""


class Network:
    """Messages that travel between the ranks of a simulated group."""

    def __init__(self, size: int, patience: float):
        self.size = size
        self.messages: dict[Label, Message] = {}
        self._deadline = time.monotonic() + patience
        self._changed = threading.Condition()
        self._failed = False

    @property
    def time_left(self) -> float:
        """Seconds until ranks that wait raise TimeoutError."""
        return max(0.0, self._deadline - time.monotonic())

    def send(self, label: Label, message: Message) -> None:
        with self._changed:
            self.messages[label] = message
            self._changed.notify_all()

    def receive(self, label: Label) -> Message:
        with self._changed:
            self._changed.wait_for(lambda: label in self.messages or self._failed, self.time_left)
            if label not in self.messages:
                raise TimeoutError("message {2} from rank {0} to rank {1} never came".format(*label))
            return self.messages.pop(label)

    def fail(self) -> None:
        """Let all ranks that wait raise TimeoutError now."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


class SimulatedExchange:
    """Exchange of one rank over a network that delivers messages as late as an `Exchange` may.

    A message leaves when its sender waits for it. A receive buffer is NaN until its receiver waits. Tests therefore
    fail if a buffer is changed before its send was waited for, or read before its receive was waited for.
    """

    def __init__(self, network: Network, rank: int):
        self.rank, self.size = rank, network.size
        self._network = network
        self._posted: Counter[tuple[int, int]] = Counter()

    def post(self, sends: Sequence[Buffer], receives: Sequence[Buffer]) -> SimulatedPending:
        for peer, tensor in (*sends, *receives):
            assert peer != self.rank, "a rank talks to itself"
            assert tensor.numel() and tensor.is_contiguous(), "a message is empty or not contiguous"
        for _, tensor in receives:
            if not has_no_memory(tensor):
                tensor.fill_(float("nan"))
        return SimulatedPending(
            self._network,
            outgoing=[(self._label(self.rank, peer), tensor, Message.of(tensor)) for peer, tensor in sends],
            incoming=[(self._label(peer, self.rank), tensor) for peer, tensor in receives],
        )

    def check(self) -> None:
        """Assert what holds when a rank is done."""

    def _label(self, sender: int, receiver: int) -> Label:
        self._posted[sender, receiver] += 1
        return sender, receiver, self._posted[sender, receiver] - 1


class SharingExchange(SimulatedExchange):
    """Simulated exchange that shares memory, as that of ranks of one machine.

    Lent memory is NaN until it is written. `check` finds what was sent from lent memory, or lies in a receive buffer
    that had no memory, and was changed since.
    """

    def __init__(self, network: Network, rank: int):
        super().__init__(network, rank)
        self._lent: dict[int, torch.Tensor] = {}
        """Tensors by the address of their memory."""
        self._landings: list[torch.Tensor] = []
        self._constant: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Tensors that must not change, with the bytes that they held."""

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        lent = torch.full(tuple(shape), float("nan"), dtype=dtype)
        self._lent[lent.untyped_storage().data_ptr()] = lent
        return lent

    def post(self, sends: Sequence[Buffer], receives: Sequence[Buffer]) -> SimulatedPending:
        self.check()
        for _, tensor in sends:
            if tensor.untyped_storage().data_ptr() in self._lent:
                self._constant.append((tensor, Message.of(tensor).content))
        self._landings += [tensor for _, tensor in receives if has_no_memory(tensor)]
        return super().post(sends, receives)

    def check(self) -> None:
        """Assert that no tensor has changed which must not."""
        landed = [tensor for tensor in self._landings if not has_no_memory(tensor)]
        self._landings = [tensor for tensor in self._landings if has_no_memory(tensor)]
        for tensor, content in self._constant:
            assert content.equal(tensor.view(torch.uint8)), "memory of a message was changed when it had been sent"
        self._constant += [(tensor, Message.of(tensor).content) for tensor in landed]


class SimulatedPending:
    def __init__(self, network: Network, outgoing: list, incoming: list):
        self._network, self._outgoing, self._incoming = network, outgoing, incoming

    def wait(self) -> None:
        for label, tensor, posted in self._outgoing:
            unchanged = posted.content.equal(tensor.view(torch.uint8))
            assert unchanged, "a buffer was changed before its send was waited for"
            self._network.send(label, posted)
        for label, tensor in self._incoming:
            message = self._network.receive(label)
            assert (message.shape, message.dtype) == (tensor.shape, tensor.dtype), "a receive does not fit its send"
            if has_no_memory(tensor):
                tensor.set_(message.content.untyped_storage(), 0, tensor.shape, tensor.stride())
            else:
                tensor.view(torch.uint8).copy_(message.content)
        self._outgoing = self._incoming = ()


def run(
    size: int,
    function: Callable[[SimulatedExchange], Any],
    patience: float = 120.0,
    exchange: type[SimulatedExchange] = SimulatedExchange,
) -> list:
    """Call `function(exchange)` on each rank of a simulated group, whose ranks are threads.

    Args:
        size: the number of ranks.
        function: a function of the rank's exchange.
        patience: the timeout in seconds.
        exchange: class of the exchanges.

    Returns:
        The result of each rank.

    Raises:
        TimeoutError: if the ranks take longer than `patience` seconds.
        Exception: the error of the first rank that raises one.
    """
    network = Network(size, patience)
    results: list = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            mine = exchange(network, rank)
            results[rank] = function(mine)
            mine.check()
        except BaseException as error:  # pytest.fail() raises a BaseException
            errors.append(error)
            network.fail()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(network.time_left + 1)  # a rank that waits for a message raises by itself
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError(f"the ranks took longer than {patience} s")
    assert not network.messages, f"messages that nobody received: {sorted(network.messages)}"
    return results


class Event(NamedTuple):
    """Action of a rank: "post" messages, "wait" for a post (by its number), or call a "kernel"."""

    what: str
    post: int | None = None


class Log:
    """Log of the actions of a rank and the bytes that it sends. It wraps the exchange and the kernel of the rank."""

    def __init__(self):
        self.events: list[Event] = []
        self.sent: Counter[tuple[torch.dtype, int]] = Counter()
        """Bytes sent, by dtype and receiving rank."""

    def exchange(self, exchange: SimulatedExchange) -> LoggedExchange:
        return LoggedExchange(exchange, self)

    def kernel(self, kernel: Kernel) -> LoggedKernel:
        return LoggedKernel(kernel, self)

    def bytes_sent(self, dtype: torch.dtype) -> int:
        return sum(count for (sent, _), count in self.sent.items() if sent == dtype)


class LoggedExchange:
    def __init__(self, exchange: SimulatedExchange, log: Log):
        self.rank, self.size = exchange.rank, exchange.size
        self._exchange, self._log, self._posts = exchange, log, 0

    def post(self, sends: Sequence[Buffer], receives: Sequence[Buffer]) -> LoggedPending:
        for peer, tensor in sends:
            self._log.sent[tensor.dtype, peer] += tensor.nbytes
        self._log.events.append(Event("post", self._posts))
        self._posts += 1
        return LoggedPending(self._exchange.post(sends, receives), self._log, self._posts - 1)


class LoggedPending:
    def __init__(self, pending: SimulatedPending, log: Log, post: int):
        self._pending, self._log, self._post = pending, log, post

    def wait(self) -> None:
        self._log.events.append(Event("wait", self._post))
        self._pending.wait()


class LoggedKernel:
    def __init__(self, kernel: Kernel, log: Log):
        self._kernel, self._log = kernel, log

    def forward(self, *args):
        self._log.events.append(Event("kernel"))
        return self._kernel.forward(*args)

    def backward(self, *args):
        self._log.events.append(Event("kernel"))
        return self._kernel.backward(*args)


class LiveBuffers(TorchDispatchMode):
    """Mode that counts the live buffers whose rows have a given shape and dtype. Views of a buffer count once.

    It sees the tensors that its thread makes or uses. `most` is the largest number of buffers at a time, and
    `most_rows` is the largest number of rows in them.
    """

    def __init__(self, row: Sequence[int], dtype: torch.dtype):
        super().__init__()
        self.most = self.most_rows = 0
        self._row, self._dtype = tuple(row), dtype
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == self._dtype and tensor.shape[1:] == self._row:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                rows = storage.nbytes() // (tensor.element_size() * tensor[:1].numel()) if len(tensor) else 0
                if rows:
                    self._alive.setdefault(reference.cdata, (reference, rows))
        self._alive = {key: buffer for key, buffer in self._alive.items() if not buffer[0].expired()}
        self.most = max(self.most, len(self._alive))
        self.most_rows = max(self.most_rows, sum(rows for _, rows in self._alive.values()))
        return result


class LargestTensor(TorchDispatchMode):
    """Mode that counts the elements of the largest tensor that its thread makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def allowed(mask: Mask) -> torch.Tensor:
    """Compute the keys that each query reads, as booleans `[B, S, S]`."""
    document_of = torch.full((len(mask.rows), mask.length), -1)
    for row, documents in enumerate(mask.rows):
        for number, document in enumerate(documents):
            for start, stop in document:
                document_of[row, start:stop] = number
    seen = (document_of[:, :, None] == document_of[:, None]) & (document_of >= 0)[:, :, None]
    pattern, index = mask.pattern, torch.arange(mask.length)
    distance = index[:, None] - index
    if pattern.causal:
        seen &= distance >= 0
    if pattern.sliding_window is not None:
        seen &= distance.abs() < pattern.sliding_window
    if pattern.chunk_size is not None:
        first = torch.zeros(len(mask.rows), mask.length, dtype=torch.long)
        for row, documents in enumerate(mask.rows):
            for document in documents:
                first[row, document[0][0] : document[-1][1]] = document[0][0]
        chunk = (index - first) // pattern.chunk_size
        seen &= chunk[:, :, None] == chunk[:, None]
    for row, blocks in enumerate(pattern.blocks):
        for block in blocks:
            within = torch.zeros(mask.length, dtype=torch.bool)
            for start, stop in block:
                within[start:stop] = True
            added = within[:, None] & within & (document_of[row][:, None] == document_of[row])
            added &= (document_of[row] >= 0)[:, None]
            if pattern.blocks_in_window and pattern.sliding_window is not None:
                added &= distance < pattern.sliding_window
            seen[row] |= added
    return seen


def in_band(queries: int, keys: int, band: Band) -> torch.Tensor:
    """Compute the keys of a tile that each query reads, as booleans `[queries, keys]`."""
    ahead = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    inside = torch.ones(queries, keys, dtype=torch.bool)
    if band.left is not None:
        inside &= ahead >= -band.left
    if band.right is not None:
        inside &= ahead <= band.right
    return inside


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention by its definition, in the dtype of the inputs.

    A query that reads no key has output 0 and an LSE of -inf.

    Args:
        query, key, value: `[B, Q, H, D]`, `[B, K, H_kv, D]` and `[B, K, H_kv, D_v]`.
        seen: `[B, Q, K]`, True for the keys that a query reads.
        scale, softcap: the scale and the softcap of scores.
        sinks: `[H]`, the sinks.
        kept: `[B, H, Q, K]`, factors of the weights, as of dropout.

    Returns:
        The output `[B, Q, H, D_v]`, and the LSE `[B, Q, H]` without gradient.
    """
    heads = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(heads, 2), value.repeat_interleave(heads, 2)
    scores, seen = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale, seen[:, None]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    visible = scores.masked_fill(~seen, torch.finfo(scores.dtype).min / 2)
    if sinks is not None:
        visible = torch.cat([visible, sinks[:, None, None].expand(*visible.shape[:3], 1)], dim=-1)
    weights = visible.softmax(-1)[..., : seen.shape[-1]] * seen
    if kept is not None:
        weights = weights * kept
    lse = scores.detach().masked_fill(~seen, float("-inf")).logsumexp(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value), lse.transpose(1, 2)


def cut(edges: Sequence[int], length: int) -> tuple:
    """Make the documents of a row that is cut at these positions."""
    return from_cu_seqlens(torch.tensor([0, *edges, length]), length)


def padded(visible: Sequence[bool]) -> tuple:
    """Make the single document of a row with padding where `visible` is False."""
    return from_attention_mask(torch.tensor([visible]))[0]


SMALL = st.integers(1, 9)
"""Group sizes of tests that run all ranks."""


@st.composite
def rows(draw, length: int) -> tuple:
    """Draw the documents of a row: one document, several (even empty ones), padding anywhere, or both."""
    kind = draw(st.sampled_from(["whole", "cut", "padded", "cut and padded"]))
    edges = draw(st.lists(st.integers(0, length), max_size=12).map(sorted)) if "cut" in kind else ()
    if "padded" not in kind:
        return cut(edges, length)
    first, last = draw(st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted))
    holes = draw(st.sets(st.integers(0, length - 1), max_size=6))
    visible = padded([first <= position < last and position not in holes for position in range(length)])
    if not visible or kind == "padded":
        return visible
    documents = (tuple(intersection(list(document), list(visible[0]))) for document in cut(edges, length))
    return tuple(document for document in documents if document)


def patterns(length: int) -> st.SearchStrategy[Pattern]:
    """Build a strategy of patterns, with and without windows and chunks of all sizes up to the length."""
    size = st.none() | st.integers(1, length + 1)
    return st.tuples(st.booleans(), size, size).map(lambda rule: Pattern(*rule))


@st.composite
def blocks(draw, length: int) -> tuple:
    """Draw the blocks of a row. Some consist of several ranges."""
    edges = draw(st.lists(st.integers(0, length), max_size=9).map(sorted))
    ranges = [pair for pair in zip(edges, edges[1:]) if pair[0] < pair[1]]
    found: dict[int, list] = {}
    for pair in ranges:
        found.setdefault(draw(st.integers(0, 3)), []).append(pair)
    found.pop(0, None)  # text between the blocks
    return tuple(tuple(block) for block in found.values())


@st.composite
def layouts(draw, max_length: int = 40, sizes: st.SearchStrategy[int] = SMALL) -> Layout:
    """Draw a layout of any fixed kind."""
    return FIXED_LAYOUTS[draw(st.sampled_from(sorted(FIXED_LAYOUTS)))](draw(st.integers(1, max_length)), draw(sizes))


@st.composite
def cases(draw, **kwargs) -> tuple[Layout, Mask]:
    """Draw a layout, and a mask of up to three rows for it."""
    layout = draw(layouts(**kwargs))
    documents = draw(st.lists(rows(layout.length), min_size=1, max_size=3))
    pattern = draw(patterns(layout.length))
    if draw(st.booleans()):
        of_rows = tuple(draw(blocks(layout.length)) for _ in documents)
        pattern = Pattern(True, pattern.sliding_window, None, of_rows, draw(st.booleans()))
    return layout, Mask(layout.length, tuple(documents), pattern)
