"""Whole sequences for a while: tokens travel from where the layout puts them to ranks that hold sequences whole.

Some modules mix tokens by themselves: states that run along the sequence, convolutions, attention that no interface
reaches. For the duration of such a module the sequences are dealt to the ranks, each to one, and afterwards its output
returns to the shards. Every token is in one place at a time, so no work is repeated, and the gradient of the way there
is the way back.

A sequence is a row, or a document where rows are packed: what the module would see were it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ...data.shard import Shard
from ...planning.layout import Layout


class Sequence(NamedTuple):
    """Positions `[start, stop)` of a row."""

    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def sequences(shard: Shard) -> list[Sequence]:
    """The sequences of a batch: documents of packed rows, else rows with their padding."""
    if not shard.packed:
        return [Sequence(row, 0, shard.length) for row in range(shard.batch_size)]
    return [
        Sequence(row, document[0][0], document[-1][1])
        for row, documents in enumerate(shard.rows)
        for document in documents
    ]


class Piece(NamedTuple):
    """Tokens of one sequence that lie next to each other on a rank.

    Args:
        token: the number of the first there, in rows laid one after another.
        place: its number in the sequence.
    """

    rank: int
    token: int
    place: int
    length: int


def pieces(layout: Layout, sequence: Sequence) -> Iterator[Piece]:
    """Where a sequence lies, from its first token to its last."""
    for rank, index, position, length in layout.pieces(sequence.start, sequence.stop):
        yield Piece(rank, sequence.row * layout.local_length(rank) + index, position - sequence.start, length)


def ranges(starts: list[int], lengths: list[int]) -> torch.Tensor:
    """`start, ..., start + length - 1` for each, one after another."""
    first, count = torch.tensor(starts, dtype=torch.long), torch.tensor(lengths, dtype=torch.long)
    before = count.cumsum(0) - count
    return torch.arange(sum(lengths)) + (first - before).repeat_interleave(count)


def deal(lengths: list[int], size: int, turn: int) -> list[int]:
    """For each length the rank that gets it: the longest first, to the rank with the least so far.

    Args:
        turn: the rank that comes first among equals. Modules take turns, so that what they keep for backward is
            spread even where there is one sequence.
    """
    owners, load = [0] * len(lengths), [0] * size
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        owner = min(range(size), key=lambda rank: (load[rank], (rank - turn) % size))
        owners[number] = owner
        load[owner] += lengths[number]
    return owners


class Resharding:
    """The exchange that makes sequences whole, and its reverse.

    Args:
        shard: the batch as this rank has it.
        turn: see `deal`.
        group: of the shard's ranks.

    `mine` are the sequences that this rank gets, shortest first.
    """

    def __init__(self, shard: Shard, turn: int, group: dist.ProcessGroup | None, device: torch.device):
        self._shard, self._group = shard, group
        everything = sequences(shard)
        owners = deal([sequence.length for sequence in everything], shard.layout.size, turn)
        dealt: list[list[Sequence]] = [[] for _ in range(shard.layout.size)]
        for owner, sequence in sorted(zip(owners, everything), key=lambda pair: pair[1].length):
            dealt[owner].append(sequence)
        self.mine = dealt[shard.rank]

        sent = [held(shard, theirs)[shard.rank] for theirs in dealt]
        received = held(shard, self.mine)
        self._send_counts, self._receive_counts = [len(x) for x, _ in sent], [len(x) for x, _ in received]
        self._tokens = torch.cat([tokens for tokens, _ in sent]).to(device)
        self._reverse = torch.cat([places for _, places in received]).to(device)
        self._order = self._reverse.argsort()

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S_local, ...]` as the tokens of this rank's sequences, one sequence after another: `[T, ...]`."""
        return linear(self._whole, self._sharded, x)[0]

    def sharded(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, ...]` back as `[B, S_local, ...]`: 0 where a token is in no sequence."""
        return linear(self._sharded, self._whole, x)[0]

    def _whole(self, x: torch.Tensor) -> list[torch.Tensor]:
        rows = x.flatten(0, 1).index_select(0, self._tokens)
        return [all_to_all(rows, self._send_counts, self._receive_counts, self._group).index_select(0, self._order)]

    def _sharded(self, x: torch.Tensor) -> list[torch.Tensor]:
        rows = x.index_select(0, self._reverse)
        return [
            scattered(
                self._shard, self._tokens, all_to_all(rows, self._receive_counts, self._send_counts, self._group)
            )
        ]


def held(shard: Shard, wanted: list[Sequence]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each rank holds of these sequences: the tokens' numbers there, and their places among those of all of them.

    A rank's tokens are in the order of the sequences.
    """
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(shard.layout.size)]
    before = 0
    for sequence in wanted:
        for piece in pieces(shard.layout, sequence):
            found[piece.rank].append((piece.token, before + piece.place, piece.length))
        before += sequence.length
    by_rank = []
    for of_rank in found:
        tokens, places, lengths = ([triple[index] for triple in of_rank] for index in range(3))
        by_rank.append((ranges(tokens, lengths), ranges(places, lengths)))
    return by_rank


def scattered(shard: Shard, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A rank's rows `[len(tokens), ...]` as `[B, S_local, ...]`: each where its token is, and 0 elsewhere."""
    whole = rows.new_zeros(math.prod(shard.local_shape), *rows.shape[1:])
    return whole.index_copy_(0, tokens, rows).unflatten(0, shard.local_shape)


Map = Callable[..., list[torch.Tensor]]
"""Tensors to tensors."""


def linear(there: Map, back: Map, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """`there(*tensors)`, of which the gradient is `back(*gradients)`.

    What is exchanged together is one node of the graph: the order of several in backward would not be certain, and all
    ranks have to enter the same exchanges in the same order.

    Args:
        there, back: linear maps, each the other's transpose.
    """
    return list(_Linear.apply(there, back, *tensors))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, there, back, *tensors):
        ctx.back = back
        return tuple(there(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return None, None, *ctx.back(*gradients)


def all_to_all(
    rows: torch.Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Rows to the ranks of a group, `sends[r]` of them to rank r, for `receives[r]` from there."""
    if group is None:
        return rows
    result = rows.new_empty(sum(receives), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), receives, sends, group=group)
    return result
