"""A layout made for the documents of a batch: equally many tokens and nearly equal work for every rank.

Zigzag shares the work of one document evenly. Of packed documents it may give one rank the late part of a long one and
another rank nothing but short ones. Here the row is cut into more chunks, which are halved again and again as thieves
split a necklace (Alon, "Splitting necklaces", 1987): close the chunks to a circle; as a window of half of them goes
round, it ends where the other half was, so somewhere on the way it has half of the work. A window and what it leaves
are cut in two places, so all ranks together hold 2 * size - 1 stretches at most, as in zigzag, however many chunks
there are; and the first halves, which later cuts do not mix, lie on different nodes. One document is dealt in zigzag.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from .layout import FIXED_LAYOUTS, Layout, zigzag
from .mask import Document

LEAST = 2048
"""Tokens of a rank from which on documents are balanced. With fewer, what the documents that are cut send, and the
messages that it takes, cost more than even work gains (`benchmarks/plan.py`), and the row is dealt in zigzag."""
FINEST = 64
"""Tokens of a chunk at the least. Rows are filled up to whole chunks: by less than a hundredth, on average."""
MOST = 64, 4096
"""Chunks a rank, and in all, beyond which no finer ones are tried."""
EVEN = 1.005
"""The largest rank's work over the mean at which no finer chunks are tried."""
SLACK = 0.005
"""How far a half may be off, as a share of a rank's work, where that cuts less off documents."""


def make_layout(name: str, length: int, size: int, documents: Iterable[Document] = ()) -> Layout:
    """The layout of this name for rows of `length` tokens that hold these documents, which only one looks at."""
    if name == "balanced":
        return balanced(length, size, documents) if length >= LEAST * size else zigzag(length, size)
    return FIXED_LAYOUTS[name](length, size)


def padded_layout(name: str, length: int, size: int, documents: Iterable[Document] = ()) -> Layout:
    """The same for rows that are padded to where all ranks hold equally many tokens."""
    owners = make_layout(name, length, size, documents).chunk_owners
    return Layout(-(-length // len(owners)) * len(owners), size, owners)


def balanced(length: int, size: int, documents: Iterable[Document], finest: int | None = None) -> Layout:
    """A layout whose ranks have equally many tokens, up to one a chunk, and nearly equal work under a causal mask.

    Its largest rank never has more work than zigzag's.

    Args:
        documents: of the row, or of all rows of a batch, which share the layout.
        finest: tokens of a chunk at the least; `FINEST` unless given.
    """
    documents, finest = list(documents), FINEST if finest is None else finest
    best = zigzag(length, size)
    least, mean = _most(best, documents), sum(work_of_chunks(length, 1, documents)) / size
    chunks = 4
    while least > EVEN * mean and length >= finest * chunks * size and (chunks <= MOST[0] or chunks * size <= MOST[1]):
        layout = _dealt(length, size, chunks, documents)
        most = _most(layout, documents)
        if most < least:
            best, least = layout, most
        chunks *= 2
    return best


def work_of_chunks(length: int, count: int, documents: Iterable[Document]) -> list[int]:
    """The causal query-key pairs of each of `count` chunks of the sequence."""
    bounds = [index * length // count for index in range(count + 1)]
    work = [0] * count
    for document in documents:
        before = 0  # tokens of the document
        for start, stop in document:
            chunk = start * count // length
            while start < stop:
                end = min(stop, bounds[chunk + 1])
                if start < end:
                    work[chunk] += (end - start) * (2 * before + end - start + 1) // 2
                    before, start = before + end - start, end
                chunk += 1
    return work


def _most(layout: Layout, documents: list[Document]) -> int:
    """The work of the rank that has most."""
    work = [0] * layout.size
    for rank, pairs in zip(layout.chunk_owners, work_of_chunks(layout.length, len(layout.chunk_owners), documents)):
        work[rank] += pairs
    return max(work)


def _dealt(length: int, size: int, chunks: int, documents: list[Document]) -> Layout:
    """So many chunks a rank, dealt by halving."""
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
    """For each of `count` chunks of the sequence, the tokens before it of the documents that it cuts."""
    tokens = [0] * (count + 1)
    for document in documents:
        first, last = document[0][0], document[-1][1]
        for chunk in range(first * count // length + 1, -(-last * count // length)):
            tokens[chunk] += max(0, chunk * length // count - first)
    return tokens


def _window(held: list[int], work: list[int], severed: list[int], count: int, share: float, slack: float) -> int:
    """Where `count` neighbours of the chunks `held` begin that have about this share of their work.

    Of those that miss it by no more than `slack`, those that cut least off documents.
    """
    sums = [0, *accumulate(work[chunk] for chunk in held)]
    cuts = [0, *(severed[chunk] if chunk == last + 1 else 0 for last, chunk in zip(held, held[1:])), 0]
    wanted = share * sums[-1]

    def cost(start: int) -> tuple[float, int, float]:
        error = abs(sums[start + count] - sums[start] - wanted)
        return max(0, error - slack), cuts[start] + cuts[start + count], error

    return min(range(len(held) - count + 1), key=cost)
