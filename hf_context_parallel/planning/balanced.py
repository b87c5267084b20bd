"""Layout for packed documents: every rank gets equally many tokens and nearly equal work.

Zigzag shares the work of one document evenly. With packed documents, zigzag may give one rank the late part of a long
document and another rank only short documents. This layout cuts the row into more chunks than zigzag. It then halves
them again and again, as thieves split a necklace (Alon, "Splitting necklaces", 1987):

- Close the chunks to a circle, and move a window of half of them around it. After half a turn the window covers the
  other half. So at some place on the way it covers half of the work.
- Each halving cuts the circle in two places. So all ranks together hold at most 2 * size - 1 stretches, as in zigzag,
  however many chunks there are.
- The first halves lie on different nodes, and later cuts do not mix them.

A single document is dealt in zigzag.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from .layout import FIXED_LAYOUTS, Layout, zigzag
from .mask import Document
from .recent import Recent

LEAST = 2048
"""Fewest tokens of a rank for which documents are balanced. Below it the row is dealt in zigzag: cut documents send
keys/values in more messages, and these cost more than the even work gains (`benchmarks/plan.py`)."""
FINEST = 64
"""Fewest tokens of a chunk. Rows are padded to whole chunks, by less than a hundredth on average."""
MOST = 64, 4096
"""Most chunks of a rank, and of all ranks. Finer chunks are tried until both are exceeded."""
EVEN = 1.005
"""Work of the busiest rank over the mean work at which finer chunks are no longer tried."""
GAIN = 0.95
"""Work of the busiest rank over that in zigzag above which `auto` deals in zigzag. It pads less, and is as good on
average where this layout is not made for the work: under a short window, and without a causal mask."""
SLACK = 0.005
"""Error that a half's work may have, as a share of a rank's mean work, so that the cuts sever fewer tokens."""


def make_layout(
    name: str, length: int, size: int, documents: Iterable[Document] = (), most: int | None = None
) -> Layout:
    """Layout of this name for rows of `length` tokens. Only `"auto"` and `"balanced"` use the documents.

    Args:
        most: the most tokens that a rank may hold if rows are padded until all ranks hold equally many. Layouts with
            finer chunks, which need more padding, are not made if a rank would hold more.
    """
    if name in FIXED_LAYOUTS:
        return FIXED_LAYOUTS[name](length, size)
    if length < LEAST * size:
        return zigzag(length, size)
    key = name, length, size, tuple(documents), most, FINEST
    return layouts.get(key, lambda: _by_work(*key))


layouts: Recent[Layout] = Recent(16)
"""Layouts that documents decide, by the arguments of `_by_work`. Batches that are alike take that of the first one."""


def _by_work(
    name: str, length: int, size: int, documents: tuple[Document, ...], most: int | None, finest: int
) -> Layout:
    """Layout of this name, which the documents decide."""
    even = zigzag(length, size)
    dealt = balanced(length, size, documents, finest, most)
    if name == "auto" and _most(dealt, documents) > GAIN * _most(even, documents):
        return even
    return dealt


def padded_layout(
    name: str, length: int, size: int, documents: Iterable[Document] = (), most: int | None = None
) -> Layout:
    """Layout of this name for rows that are padded until all ranks hold equally many tokens.

    Args:
        most: as for `make_layout`.
    """
    owners = make_layout(name, length, size, documents, most).chunk_owners
    return Layout(-(-length // len(owners)) * len(owners), size, owners)


def fewest_chunks(name: str) -> int:
    """Chunks that a rank has at least in the layout of this name, of each of which it holds equally many tokens."""
    return len(FIXED_LAYOUTS.get(name, zigzag)(0, 1).chunk_owners)


def balanced(
    length: int, size: int, documents: Iterable[Document], finest: int | None = None, most: int | None = None
) -> Layout:
    """Deal a row so that ranks have nearly equal work under a causal mask, and equally many tokens.

    Chunks differ by one token at most. The busiest rank never has more work than the busiest rank of zigzag.

    Args:
        documents: documents of the row, or of all rows of a batch, which share the layout.
        finest: fewest tokens of a chunk; `FINEST` unless given.
        most: the most tokens of a rank, as for `make_layout`.
    """
    documents, finest = list(documents), FINEST if finest is None else finest
    best = zigzag(length, size)
    least, mean = _most(best, documents), sum(work_of_chunks(length, 1, documents)) / size
    chunks = 4
    while least > EVEN * mean and length >= finest * chunks * size and (chunks <= MOST[0] or chunks * size <= MOST[1]):
        if most is not None and -(-length // (chunks * size)) * chunks > most:
            break  # twice the chunks would not need less padding
        layout = _dealt(length, size, chunks, documents)
        busiest = _most(layout, documents)
        if busiest < least:
            best, least = layout, busiest
        chunks *= 2
    return best


def work_of_chunks(length: int, count: int, documents: Iterable[Document]) -> list[int]:
    """Causal query-key pairs of each of `count` chunks of the sequence."""
    bounds = [index * length // count for index in range(count + 1)]
    work = [0] * count
    for document in documents:
        before = 0  # tokens of the document before `start`
        for start, stop in document:
            chunk = start * count // length
            while start < stop:
                end = min(stop, bounds[chunk + 1])
                if start < end:
                    work[chunk] += (end - start) * (2 * before + end - start + 1) // 2
                    before, start = before + end - start, end
                chunk += 1
    return work


def _most(layout: Layout, documents: Sequence[Document]) -> int:
    """Query-key pairs of the busiest rank."""
    work = [0] * layout.size
    for rank, pairs in zip(layout.chunk_owners, work_of_chunks(layout.length, len(layout.chunk_owners), documents)):
        work[rank] += pairs
    return max(work)


def _dealt(length: int, size: int, chunks: int, documents: list[Document]) -> Layout:
    """Deal `chunks` chunks to each rank, by halving."""
    work, severed = work_of_chunks(length, chunks * size, documents), _severed(length, chunks * size, documents)
    slack = SLACK * sum(work) / size
    owners = [0] * len(work)
    groups = [(list(range(len(work))), 0, size)]
    while groups:
        held, first, last = groups.pop()
        if last - first == 1:
            for chunk in held:
                owners[chunk] = first
            continue
        middle = (first + last) // 2
        # The half that begins the sequence has the lower ranks, as in zigzag.
        count = chunks * (last - middle)
        start = _window(held, work, severed, count, (last - middle) / (last - first), slack)
        groups.append((held[:start] + held[start + count :], first, middle))
        groups.append((held[start : start + count], middle, last))
    return Layout(length, size, tuple(owners))


def _severed(length: int, count: int, documents: list[Document]) -> list[int]:
    """Tokens that are cut off their documents at the beginning of each of `count` chunks of the sequence.

    These are the tokens that lie before the chunk, of the documents that go on in it.
    """
    tokens = [0] * (count + 1)
    for document in documents:
        first, last = document[0][0], document[-1][1]
        for chunk in range(first * count // length + 1, -(-last * count // length)):
            tokens[chunk] += max(0, chunk * length // count - first)
    return tokens


def _window(held: list[int], work: list[int], severed: list[int], count: int, share: float, slack: float) -> int:
    """Find a window of `count` neighbouring chunks that has about `share` of the work of all chunks in `held`.

    Among windows whose error is at most `slack`, take the one that cuts the fewest tokens off their documents.

    Returns:
        The index in `held` at which the window begins.
    """
    sums = [0, *accumulate(work[chunk] for chunk in held)]
    cuts = [0, *(severed[chunk] if chunk == last + 1 else 0 for last, chunk in zip(held, held[1:])), 0]
    wanted = share * sums[-1]

    def cost(start: int) -> tuple[float, int, float]:
        error = abs(sums[start + count] - sums[start] - wanted)
        return max(0, error - slack), cuts[start] + cuts[start + count], error

    return min(range(len(held) - count + 1), key=cost)
