"""Halo exchange for a causal convolution of a shard.

A causal convolution of width K reads the K - 1 tokens before each token. Some of them may lie on other ranks. These
are the halo, and their owners send them. A stretch is a run of consecutive tokens on one rank. All stretches are laid
one after another in one row, each with its K - 1 earlier tokens in front. Before the start of a sequence these are
zeros, with which a convolution pads too. So one call convolves all stretches, and no sequence sees another.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ...data.shard import Shard
from ...distributed.host import to_device
from .resharding import Piece, all_to_all, linear, pieces, ranges, scattered, sequences


class Halo:
    """Exchange that puts the halo before each stretch of this rank, and its reverse.

    Args:
        shard: the shard of this rank.
        width: number of tokens before each stretch: K - 1.
        group: process group of the CP group; None for one rank.
    """

    def __init__(self, shard: Shard, width: int, group: dist.ProcessGroup | None, device: torch.device):
        self._shard, self._group = shard, group
        size, me = shard.layout.size, shard.rank
        sent: list[list[Piece]] = [[] for _ in range(size)]  # by reader
        received: list[list[tuple[int, int]]] = [[] for _ in range(size)]  # by owner: slot and length
        own: list[tuple[int, int, int]] = []  # token, slot and length
        slots = 1  # the first slot stays 0, so that a rank without tokens has something to convolve
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
        self._sent = to_device(ranges([part.token for part in parts], [part.length for part in parts]), device)
        self._arrival = to_device(ranges(*_columns(arriving, 2)), device)
        tokens, places, lengths = _columns(own, 3)
        self._tokens, self._places = (to_device(ranges(begins, lengths), device) for begins in (tokens, places))

    def extended(self, x: torch.Tensor) -> torch.Tensor:
        """Lay out `[B, S_local, C]` as stretches, each with its halo in front: `[1, T, C]`."""
        return linear(self._extended, self._gathered, x)[0]

    def trimmed(self, x: torch.Tensor) -> torch.Tensor:
        """Bring `[1, T, C]` back to `[B, S_local, C]`, without the halos. Tokens of no sequence are 0."""
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
    """Return the last `width` tokens of a sequence as pieces.

    Args:
        before: pieces of the sequence in order, from its first token on.
    """
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
