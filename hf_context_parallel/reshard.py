"""Whole sequences for a while: tokens travel from where the layout puts them to ranks that hold sequences whole.

Some modules mix tokens by themselves: states that run along the sequence, convolutions, attention that no interface
reaches. For the duration of such a module the sequences are dealt to the ranks, each to one, and afterwards its output
returns to the shards. Every token is in one place at a time, so no work is repeated, and the gradient of the way there
is the way back.

A sequence is a row, or a document where rows are packed: what the module would see were it alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .data import Shard
from .intervals import intersection


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

        sent = [_held(shard, shard.rank, theirs) for theirs in dealt]
        received = [_held(shard, rank, self.mine) for rank in range(shard.layout.size)]
        self._send_counts, self._receive_counts = [len(x) for x, _ in sent], [len(x) for x, _ in received]
        self._tokens = torch.cat([tokens for tokens, _ in sent]).to(device)
        self._order = torch.cat([place for _, place in received]).argsort().to(device)
        self._reverse = self._order.argsort()

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S_local, ...]` as the tokens of this rank's sequences, one sequence after another: `[T, ...]`."""
        rows = x.flatten(0, 1).index_select(0, self._tokens)
        return self._exchange(rows, self._send_counts, self._receive_counts).index_select(0, self._order)

    def sharded(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, ...]` back as `[B, S_local, ...]`: 0 where a token is in no sequence."""
        rows = x.index_select(0, self._reverse)
        rows = self._exchange(rows, self._receive_counts, self._send_counts)
        local = self._shard.batch_size, self._shard.layout.local_length(self._shard.rank)
        return x.new_zeros(local[0] * local[1], *x.shape[1:]).index_copy(0, self._tokens, rows).unflatten(0, local)

    def _exchange(self, rows: torch.Tensor, sends: list[int], receives: list[int]) -> torch.Tensor:
        return rows if self._group is None else _AllToAll.apply(rows, sends, receives, self._group)


def _held(shard: Shard, rank: int, wanted: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rank` holds of these sequences: the tokens' numbers there, and their places among the sequences'."""
    layout, local_length = shard.layout, shard.layout.local_length(rank)
    tokens, places, before = [], [], 0
    for sequence in wanted:
        index = 0
        for start, stop in layout.intervals(rank):
            for first, last in intersection([(start, stop)], [(sequence.start, sequence.stop)]):
                token = sequence.row * local_length + index + first - start
                tokens.append(torch.arange(token, token + last - first))
                places.append(torch.arange(before + first - sequence.start, before + last - sequence.start))
            index += stop - start
        before += sequence.length
    empty = torch.empty(0, dtype=torch.long)
    return torch.cat([empty, *tokens]), torch.cat([empty, *places])


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group, `sends[r]` of them to rank r; the gradient goes the other way."""

    @staticmethod
    def forward(ctx, rows, sends, receives, group):
        ctx.arguments = receives, sends, group
        return _all_to_all(rows, sends, receives, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _all_to_all(grad, *ctx.arguments), None, None, None


def _all_to_all(rows, sends, receives, group):
    result = rows.new_empty(sum(receives), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), receives, sends, group=group)
    return result
