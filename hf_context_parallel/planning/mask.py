"""What may be seen: the documents of each row, and which of a document's tokens a token reads.

A mask is host integers. It is found on the whole batch, before sharding: a shard that begins inside a document cannot
tell that it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .intervals import Interval, intersection

MOST_STRETCHES = 256
"""Stretches of tokens between padding that a row may have: a plan's size grows with their square."""

Document = tuple[Interval, ...]
"""The position ranges of one document's tokens. There are several where padding lies inside it."""


class Pattern(NamedTuple):
    """Which of its document's tokens a token reads: a layer type of a model has one.

    Args:
        causal: itself and what comes before it; otherwise, all of its document.
        sliding_window: of these, those less than this many positions away. None for all.
        chunk_size: of these, those in its own chunk of the document, which is cut into chunks of this many positions
            from its first token on. None for all.
    """

    causal: bool = True
    sliding_window: int | None = None
    chunk_size: int | None = None


FULL_CAUSAL = Pattern()


@dataclass(frozen=True)
class Mask:
    """Which query-key pairs of a batch count.

    Args:
        length: tokens a row, padding included.
        rows: for each row its documents. Tokens of no document are padding: they neither read nor are read.
        pattern: which of its document's tokens a token reads.

    Raises:
        ValueError: if a window or a chunk has no token.
    """

    length: int
    rows: tuple[tuple[Document, ...], ...]
    pattern: Pattern = FULL_CAUSAL

    def __post_init__(self) -> None:
        for name in ("sliding_window", "chunk_size"):
            value = getattr(self.pattern, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a number of tokens, 1 or more, or None for no limit.")

    def apart(self) -> tuple[tuple[Document, ...], ...]:
        """The rows as sets of tokens that read each other and no others: documents, or their chunks."""
        size = self.pattern.chunk_size
        if size is None:
            return self.rows
        return tuple(tuple(chunk for document in row for chunk in chunks(document, size)) for row in self.rows)


def chunks(document: Document, size: int) -> list[Document]:
    """A document cut every `size` positions, counted from its first token."""
    (first, _), (_, last) = document[0], document[-1]
    edges = [(start, start + size) for start in range(first, last, size)]
    cut = (tuple(intersection(list(document), [edge])) for edge in edges)
    return [chunk for chunk in cut if chunk]


def whole_rows(batch_size: int, length: int) -> tuple[tuple[Document, ...], ...]:
    """Rows of one document each."""
    return ((((0, length),),),) * batch_size


def from_cu_seqlens(cu_seqlens: torch.Tensor, length: int) -> tuple[Document, ...]:
    """The documents of one row from their cumulative lengths, `[documents + 1]`: 0, ..., `length`.

    Raises:
        ValueError: if they do not begin at 0, ascend and end at `length`.
    """
    edges = cu_seqlens.tolist()
    ascending = all(start <= stop for start, stop in zip(edges, edges[1:]))
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != length or not ascending:
        raise ValueError(
            f"cu_seqlens must ascend from 0 to the row's length of {length} tokens, but it is {shortened(edges)}. "
            "Put padding at the end of the row into a document of its own."
        )
    return tuple(((start, stop),) for start, stop in zip(edges, edges[1:]) if start < stop)


def from_position_ids(position_ids: torch.Tensor) -> tuple[tuple[Document, ...], ...]:
    """The documents of each row of `[B, S]` positions: one begins wherever the step from the last is not 1."""
    length = position_ids.shape[1]
    rows = []
    for row in position_ids:
        starts = ((row.diff() != 1).nonzero().flatten() + 1).tolist()
        edges = [0, *starts, length]
        rows.append(tuple(((start, stop),) for start, stop in zip(edges, edges[1:])))
    return tuple(rows)


def from_attention_mask(attention_mask: torch.Tensor) -> tuple[tuple[Document, ...], ...]:
    """One document a row of a `[B, S]` padding mask: its tokens that are not 0.

    Raises:
        ValueError: if padding cuts a row into more stretches than a plan can be made of.
    """
    rows = []
    for number, row in enumerate(attention_mask.bool()):
        tokens = torch.nn.functional.pad(row.int(), (1, 1))
        edges = tokens.diff().nonzero().flatten().tolist()
        runs = tuple(zip(edges[::2], edges[1::2]))
        if len(runs) > MOST_STRETCHES:
            raise ValueError(
                f"row {number} of attention_mask has {len(runs)} stretches of tokens with padding between them, and "
                f"{MOST_STRETCHES} is the most that is supported. Leave such padding out of the row."
            )
        rows.append((runs,) if runs else ())
    return tuple(rows)


def shortened(values: list[int]) -> str:
    """A list as an error message shows it."""
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"


def layer_type(pattern: Pattern) -> str:
    """What Transformers calls layers with a mask of this pattern."""
    if pattern.sliding_window is not None:
        return "sliding_attention"
    return "full_attention" if pattern.chunk_size is None else "chunked_attention"
