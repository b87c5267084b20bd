"""The tokens of a document as each rank holds them."""

from __future__ import annotations

from typing import NamedTuple

from .intervals import Interval
from .layout import Layout
from .mask import Mask
from .tiles import joined


class Piece(NamedTuple):
    """Tokens of one document that are neighbours on their rank and in the sequence."""

    start: int
    stop: int
    position: int

    @property
    def end(self) -> int:
        """The position after the last token's."""
        return self.position + self.stop - self.start

    def clip(self, first: int, last: int) -> Piece | None:
        """Its tokens at positions `[first, last)`, if there are any."""
        begin, end = max(first, self.position), min(last, self.end)
        if begin >= end:
            return None
        start = self.start + begin - self.position
        return Piece(start, start + end - begin, begin)


def pieces_of_documents(layout: Layout, mask: Mask) -> list[dict[int, list[Piece]]]:
    """For each document of the batch: the pieces that each rank holds, by position."""
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
    """Add a piece, to the last one where it goes on in both numberings."""
    if pieces and (pieces[-1].stop, pieces[-1].end) == (piece.start, piece.position):
        piece = Piece(pieces[-1].start, piece.stop, pieces.pop().position)
    pieces.append(piece)


def runs_of(pieces: list[Piece]) -> tuple[Interval, ...]:
    """The pieces as ranges of their rank's tokens, with neighbours joined."""
    return joined(tuple((piece.start, piece.stop) for piece in pieces))
