"""A short convolution of a shard: each stretch of a rank's tokens behind those that come before it in its sequence.

A causal convolution of width K reads the K - 1 tokens before each. Those that a rank does not hold are its halo, and
travel to it from their owners. The stretches are laid one after another, each behind K - 1 tokens of its own (0 before
a sequence begins, which is also what a convolution pads with), so that one call convolves them all and sequences do
not see each other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ...data.shard import Shard
from .resharding import Piece, all_to_all, linear, pieces, ranges, scattered, sequences


class Halo:
    """The exchange that puts tokens of other ranks before this rank's, and its reverse.

    Args:
        shard: the batch as this rank has it.
        width: the most tokens before a stretch.
        group: of the shard's ranks.
    """

    def __init__(self, shard: Shard, width: int, group: dist.ProcessGroup | None, device: torch.device):
        self._shard, self._group = shard, group
        size, me = shard.layout.size, shard.rank
        sent: list[list[Piece]] = [[] for _ in range(size)]  # by reader
        received: list[list[tuple[int, int]]] = [[] for _ in range(size)]  # by owner: slot and length
        own: list[tuple[int, int, int]] = []  # token, slot and length
        slots = 1  # of 0, so that a rank without tokens has something to convolve
        for sequence in sequences(shard):
            before: list[Piece] = []
            for piece in pieces(shard.layout, sequence):
                begins = not before or before[-1].rank != piece.rank
                if begins and piece.rank == me:
                    slots += width
                for part in _last(before, width) if begins else ():
                    if part.rank == me:
                        sent[piece.rank].append(part)
                    if piece.rank == me:
                        received[part.rank].append((slots + part.place - piece.place, part.length))
                if piece.rank == me:
                    own.append((piece.token, slots, piece.length))
                    slots += piece.length
                before.append(piece)
        parts = [part for parts in sent for part in parts]
        arriving = [part for parts in received for part in parts]
        self._slots = slots
        self._sends = [sum(part.length for part in parts) for parts in sent]
        self._receives = [sum(length for _, length in parts) for parts in received]
        self._sent = ranges([part.token for part in parts], [part.length for part in parts]).to(device)
        self._arrival = ranges(*_columns(arriving, 2)).to(device)
        tokens, places, lengths = _columns(own, 3)
        self._tokens, self._places = ranges(tokens, lengths).to(device), ranges(places, lengths).to(device)

    def extended(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S_local, C]` as stretches behind their halos, one after another: `[1, T, C]`."""
        return linear(self._extended, self._gathered, x)[0]

    def trimmed(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, T, C]` back as `[B, S_local, C]`, without the halos: 0 where a token is in no sequence."""
        return linear(self._trimmed, self._placed, x)[0]

    def _extended(self, x: torch.Tensor) -> list[torch.Tensor]:
        halo = all_to_all(x.flatten(0, 1).index_select(0, self._sent), self._sends, self._receives, self._group)
        extended = self._placed(x)[0]
        extended[0].index_copy_(0, self._arrival, halo)
        return [extended]

    def _gathered(self, grad: torch.Tensor) -> list[torch.Tensor]:
        halo = all_to_all(grad[0].index_select(0, self._arrival), self._receives, self._sends, self._group)
        gathered = self._trimmed(grad)[0]
        gathered.flatten(0, 1).index_add_(0, self._sent, halo)
        return [gathered]

    def _placed(self, x: torch.Tensor) -> list[torch.Tensor]:
        rows = x.flatten(0, 1).index_select(0, self._tokens)
        return [rows.new_zeros(self._slots, *rows.shape[1:]).index_copy_(0, self._places, rows)[None]]

    def _trimmed(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [scattered(self._shard, self._tokens, x[0].index_select(0, self._places))]


def _last(before: list[Piece], width: int) -> list[Piece]:
    """The last `width` tokens of these pieces of a sequence, from its first token on, as pieces."""
    parts: list[Piece] = []
    for piece in reversed(before):
        length = min(piece.length, width)
        skipped = piece.length - length
        if length:
            parts.append(Piece(piece.rank, piece.token + skipped, piece.place + skipped, length))
        width -= length
        if not width:
            break
    return parts[::-1]


def _columns(rows: list[tuple[int, ...]], count: int) -> list[list[int]]:
    return [[row[index] for row in rows] for index in range(count)]
