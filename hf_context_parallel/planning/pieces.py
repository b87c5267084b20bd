"""Pieces: the tokens of a document as each rank holds them."""

from __future__ import annotations

from typing import NamedTuple

from .intervals import Interval
from .layout import Layout
from .mask import Mask
from .tiles import Band, joined


class Piece(NamedTuple):
    """Tokens of one document that lie side by side, both on their rank and in the sequence.

    They are the tokens `[start, stop)` of the rank. The first of them is at `position` in the sequence.
    """

    start: int
    stop: int
    position: int

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.position + self.stop - self.start

    def clip(self, first: int, last: int) -> Piece | None:
        """Part of the piece at positions `[first, last)`, or None if it has no token there."""
        begin, end = max(first, self.position), min(last, self.end)
        if begin >= end:
            return None
        start = self.start + begin - self.position
        return Piece(start, start + end - begin, begin)


def band_between(query: Piece, key: Piece, nearest: int, furthest: int) -> Band:
    """Band of a tile in which queries read the keys that lie `nearest` to `furthest` positions before them."""
    beyond = query.end - key.end
    return Band(furthest - beyond, beyond - nearest)


def pieces_of_documents(layout: Layout, mask: Mask) -> list[dict[int, list[Piece]]]:
    """List the pieces that each rank holds of each document of the batch, in the order of the sequence."""
    local_lengths = [layout.local_length(rank) for rank in range(layout.size)]
    documents = []
    for row, row_documents in enumerate(mask.apart()):
        for document in row_documents:
            pieces: dict[int, list[Piece]] = {}
            for start, stop in document:
                for rank, index, position, length in layout.pieces(start, stop):
                    first = row * local_lengths[rank] + index
                    extend(pieces.setdefault(rank, []), Piece(first, first + length, position))
            documents.append(pieces)
    return documents


def extend(pieces: list[Piece], piece: Piece) -> None:
    """Append a piece, or join it to the last one if it follows on both the rank and the sequence."""
    if pieces and (pieces[-1].stop, pieces[-1].end) == (piece.start, piece.position):
        piece = Piece(pieces[-1].start, piece.stop, pieces.pop().position)
    pieces.append(piece)


def runs_of(pieces: list[Piece]) -> tuple[Interval, ...]:
    """Pieces as ranges of their rank's tokens, with neighbours joined."""
    return joined(tuple((piece.start, piece.stop) for piece in pieces))
