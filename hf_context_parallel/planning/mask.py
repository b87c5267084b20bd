"""Masks: the documents of each row, and the pattern by which a token reads the tokens of its document.

A mask consists of integers on the host. It is found on the whole batch, before sharding, since a shard cannot tell
whether it begins inside a document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .intervals import Interval, difference, intersection, near_indices, total

MOST_STRETCHES = 256
"""Most stretches of tokens between padding in a row. The size of a plan grows with their square."""

Document = tuple[Interval, ...]
"""Position ranges of the tokens of one document. There are several if padding lies inside the document."""
Block = tuple[Interval, ...]
"""Position ranges of tokens that read each other whatever the pattern says, such as those of an image."""


class Pattern(NamedTuple):
    """Rule by which a token reads the tokens of its document. Each layer type of a model has one.

    Args:
        causal: a token reads itself and the tokens before it. Otherwise, it reads all tokens of its document.
        sliding_window: a token reads only those of them that are less than this many positions away. None for all.
        chunk_size: a token reads only those of them that lie in its own chunk. A document is cut into chunks of this
            many positions from its first token on. None for all.
        blocks: for each row of the batch, sets of its tokens that read each other too, also those that come later.
            Documents cut them. Empty if no row has any. Only causal patterns without chunks have blocks.
        blocks_in_window: the window holds for earlier tokens of the same block as well.

    Example: a window of 3 and a block of the tokens 1 to 4. Queries are rows, x is a key of the window, b is one that
    the block adds, and w is one that it adds unless `blocks_in_window` is set.

        x . . . . .
        x x b b b .
        x x x b b .
        . x x x b .
        . w x x x .
        . . . x x x
    """

    causal: bool = True
    sliding_window: int | None = None
    chunk_size: int | None = None
    blocks: tuple[tuple[Block, ...], ...] = ()
    blocks_in_window: bool = False

    @property
    def rule(self) -> Pattern:
        """The pattern without blocks. It is the same for all batches."""
        return Pattern(*self[:3])


FULL_CAUSAL = Pattern()


@dataclass(frozen=True)
class Mask:
    """Query-key pairs that attention computes for a batch.

    Args:
        length: tokens a row, padding included.
        rows: the documents of each row. Tokens of no document are padding: they neither read nor are read.
        pattern: rule by which a token reads the tokens of its document.

    Raises:
        ValueError: if `sliding_window` or `chunk_size` is less than 1, or not an integer; or if the pattern cannot
            have blocks.
    """

    length: int
    rows: tuple[tuple[Document, ...], ...]
    pattern: Pattern = FULL_CAUSAL

    def __post_init__(self) -> None:
        for name in ("sliding_window", "chunk_size"):
            value = getattr(self.pattern, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"{name}={value!r} is not a number of tokens. Give an integer of 1 or more, or None for no limit."
                )
        if self.pattern.blocks and (not self.pattern.causal or self.pattern.chunk_size is not None):
            raise ValueError(
                f"blocks of tokens were given with causal={self.pattern.causal} and chunk_size="
                f"{self.pattern.chunk_size}. Give blocks with causal=True and no chunk_size."
            )

    def blocks_of_documents(self) -> list[list[Block]]:
        """List the blocks of each document of `apart`: those of its row, without tokens of other documents."""
        found: list[list[Block]] = []
        blocks = self.pattern.blocks or ((),) * len(self.rows)
        for documents, of_row in zip(self.apart(), blocks):
            found += _shared_out(documents, of_row)
        return found

    def apart(self) -> tuple[tuple[Document, ...], ...]:
        """Rows as sets of tokens that read no token of another set: documents, or chunks of documents."""
        size = self.pattern.chunk_size
        if size is None:
            return self.rows
        return tuple(tuple(chunk for document in row for chunk in chunks(document, size)) for row in self.rows)


def _shared_out(documents: tuple[Document, ...], blocks: tuple[Block, ...]) -> list[list[Block]]:
    """List the parts of blocks that lie in each document of a row, without those of a single token."""
    if not blocks:
        return [[] for _ in documents]
    ranges = sorted((start, stop, number) for number, block in enumerate(blocks) for start, stop in block)
    edges = [(start, stop) for start, stop, _ in ranges]
    found = []
    for document in documents:
        parts: dict[int, list[Interval]] = {}
        first, last = near_indices((document[0][0], document[-1][1]), edges)
        for start, stop, number in ranges[first:last]:
            parts.setdefault(number, []).extend(intersection([(start, stop)], list(document)))
        found.append([tuple(part) for part in parts.values() if total(part) > 1])
    return found


def chunks(document: Document, size: int) -> list[Document]:
    """Cut a document every `size` positions, counted from its first token."""
    (first, _), (_, last) = document[0], document[-1]
    edges = [(start, start + size) for start in range(first, last, size)]
    cut = (_cut(document, edge) for edge in edges)
    return [chunk for chunk in cut if chunk]


def readers_in_padding(mask: Mask) -> tuple[Mask, Mask] | None:
    """Describe what padding reads: the tokens of its row, by the same pattern. No token reads padding.

    Attention of Transformers masks the keys of padding and not its queries, so a model has outputs at padding too.

    Returns:
        Two masks whose documents belong together: the tokens that are read, and the padding that reads them. None if
        no row has one document and padding.
    """
    size, length = mask.pattern.chunk_size, mask.length
    read, readers = [], []
    for row in mask.rows:
        pairs = []
        if len(row) == 1 and row[0] != ((0, length),):
            padding = tuple(difference([(0, length)], list(row[0])))
            edges = [(0, length)]
            if size is not None:
                edges = [(start, min(start + size, length)) for start in range(row[0][0][0], length, size)]
            pairs = [(_cut(row[0], edge), _cut(padding, edge)) for edge in edges]
        pairs = [(tokens, others) for tokens, others in pairs if tokens and others]
        read.append(tuple(tokens for tokens, _ in pairs))
        readers.append(tuple(others for _, others in pairs))
    pattern = mask.pattern._replace(chunk_size=None)
    return (Mask(length, tuple(read), pattern), Mask(length, tuple(readers), pattern)) if any(read) else None


def _cut(intervals: Document, edge: Interval) -> Document:
    return tuple(intersection(list(intervals), [edge]))


def whole_rows(batch_size: int, length: int) -> tuple[tuple[Document, ...], ...]:
    """Rows that hold one document each."""
    return ((((0, length),),),) * batch_size


def from_cu_seqlens(cu_seqlens: torch.Tensor, length: int) -> tuple[Document, ...]:
    """Documents of one row, from their cumulative lengths `[documents + 1]`: 0, ..., `length`.

    Raises:
        ValueError: if the cumulative lengths are no integers, or do not begin at 0, ascend and end at `length`.
    """
    if cu_seqlens.dim() != 1 or (len(cu_seqlens) and cu_seqlens.is_floating_point()):
        raise ValueError(
            f"cu_seqlens has the dtype {cu_seqlens.dtype} and the shape {tuple(cu_seqlens.shape)}, and it must be a "
            "list of integers: 0, and the end of each document. Give torch.int32 of [documents + 1]."
        )
    edges = cu_seqlens.tolist()
    ascending = all(start <= stop for start, stop in zip(edges, edges[1:]))
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != length or not ascending:
        raise ValueError(
            f"cu_seqlens is {shortened(edges)}, and does not ascend from 0 to the row's length of {length} tokens. "
            "Put padding at the end of the row into a document of its own."
        )
    return tuple(((start, stop),) for start, stop in zip(edges, edges[1:]) if start < stop)


def from_position_ids(position_ids: torch.Tensor) -> tuple[tuple[Document, ...], ...]:
    """Documents of each row of `[B, S]` positions. One begins wherever a position is not the last one plus 1."""
    length = position_ids.shape[1]
    rows = []
    for row in position_ids:
        starts = ((row.diff() != 1).nonzero().flatten() + 1).tolist()
        edges = [0, *starts, length]
        rows.append(tuple(((start, stop),) for start, stop in zip(edges, edges[1:])))
    return tuple(rows)


def from_attention_mask(attention_mask: torch.Tensor) -> tuple[tuple[Document, ...], ...]:
    """One document for each row of a `[B, S]` padding mask: the tokens where the mask is not 0.

    Raises:
        ValueError: if a value is NaN, or padding cuts a row into more than `MOST_STRETCHES` stretches.
    """
    if bool(attention_mask.isnan().any()):
        raise ValueError(
            "attention_mask has NaN, and must be 1 at tokens and 0 at padding. Find out where it comes from."
        )
    rows = []
    for number, row in enumerate(attention_mask.bool()):
        tokens = torch.nn.functional.pad(row.int(), (1, 1))
        edges = tokens.diff().nonzero().flatten().tolist()
        runs = tuple(zip(edges[::2], edges[1::2]))
        if len(runs) > MOST_STRETCHES:
            raise ValueError(
                f"row {number} of attention_mask has {len(runs)} stretches of tokens with padding between them, "
                f"more than the {MOST_STRETCHES} that are supported. Leave such padding out of the row."
            )
        rows.append((runs,) if runs else ())
    return tuple(rows)


def shortened(values: list[int]) -> str:
    """Write a list for an error message, with the middle of a long one left out."""
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"


def layer_type(pattern: Pattern) -> str:
    """Name that Transformers gives to layers with a mask of this pattern."""
    if pattern.sliding_window is not None:
        return "sliding_attention"
    return "full_attention" if pattern.chunk_size is None else "chunked_attention"
