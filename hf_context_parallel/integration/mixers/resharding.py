"""Resharding: an exchange that turns shards into whole sequences, and back.

Some modules mix tokens themselves: state spaces, convolutions, attention that does not use the interface. For such a
module each sequence is dealt to one rank, which gets all its tokens. The output of the module returns to the shards.
Every token is on one rank at a time, so no work is repeated. The gradient of each exchange is its reverse.

A sequence is a row, or one document of a packed row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ...data.shard import Shard
from ...distributed.host import to_device
from ...planning.layout import Layout


class Sequence(NamedTuple):
    """A sequence: positions `[start, stop)` of a row."""

    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def sequences(shard: Shard) -> list[Sequence]:
    """List the sequences of a batch: documents of packed rows, else rows with their padding."""
    if not shard.packed:
        return [Sequence(row, 0, shard.length) for row in range(shard.batch_size)]
    return [
        Sequence(row, document[0][0], document[-1][1])
        for row, documents in enumerate(shard.rows)
        for document in documents
    ]


class Piece(NamedTuple):
    """Consecutive tokens of one sequence that lie side by side on one rank.

    Args:
        rank: the rank that holds them.
        token: index of the first token on that rank, `row * local_length + index in the row`.
        place: index of the first token in the sequence.
        length: number of tokens.
    """

    rank: int
    token: int
    place: int
    length: int


def pieces(layout: Layout, sequence: Sequence) -> Iterator[Piece]:
    """Yield the pieces of a sequence in order, with the ranks that hold them."""
    for rank, index, position, length in layout.pieces(sequence.start, sequence.stop):
        yield Piece(rank, sequence.row * layout.local_length(rank) + index, position - sequence.start, length)


def ranges(starts: list[int], lengths: list[int]) -> torch.Tensor:
    """Concatenate the ranges `start, ..., start + length - 1`."""
    first, count = torch.tensor(starts, dtype=torch.long), torch.tensor(lengths, dtype=torch.long)
    before = count.cumsum(0) - count
    return torch.arange(sum(lengths)) + (first - before).repeat_interleave(count)


def deal(lengths: list[int], size: int, turn: int) -> list[int]:
    """Deal sequences to ranks, longest first, each to the rank with the fewest tokens so far.

    Args:
        lengths: number of tokens of each sequence.
        size: number of ranks.
        turn: the rank that comes first among equals. It differs from module to module, so that activations saved for
            backward are spread over the ranks even if there is one sequence only.

    Returns:
        The rank of each sequence.
    """
    owners, load = [0] * len(lengths), [0] * size
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        owner = min(range(size), key=lambda rank: (load[rank], (rank - turn) % size))
        owners[number] = owner
        load[owner] += lengths[number]
    return owners


class Resharding:
    """Exchange that turns shards into whole sequences, and its reverse.

    The attribute `mine` lists the sequences that this rank gets, shortest first.

    Args:
        shard: the shard of this rank.
        turn: see `deal`.
        group: process group of the CP group; None for one rank.
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
        self._tokens = to_device(torch.cat([tokens for tokens, _ in sent]), device)
        self._reverse = to_device(torch.cat([places for _, places in received]), device)
        self._order = self._reverse.argsort()

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange `[B, S_local, ...]` for the tokens of `mine`, one sequence after another: `[T, ...]`."""
        return linear(self._whole, self._sharded, x)[0]

    def sharded(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[T, ...]` to the shards, `[B, S_local, ...]`. Tokens of no sequence are 0."""
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
    """Locate the tokens of these sequences on every rank, in the order of the sequences.

    Returns:
        For each rank two index vectors: the tokens on that rank, and their places when all sequences are laid one
        after another.
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
    """Scatter rows `[len(tokens), ...]` to their tokens in `[B, S_local, ...]`, which is 0 elsewhere."""
    whole = rows.new_zeros(math.prod(shard.local_shape), *rows.shape[1:])
    return whole.index_copy_(0, tokens, rows).unflatten(0, shard.local_shape)


Map = Callable[..., list[torch.Tensor]]
"""A function from tensors to a list of tensors."""


def linear(there: Map, back: Map, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Compute `there(*tensors)`, whose gradient is `back(*gradients)`.

    Tensors that are exchanged together are one node of the graph. With several nodes the order of exchanges in
    backward could differ between ranks, and then ranks would wait for each other.

    Args:
        there, back: two linear maps. Each is the transpose of the other.
    """
    return list(_Linear.apply(there, back, *tensors))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, there: Callable, back: Callable, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.back = back
        return tuple(there(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *ctx.back(*gradients)


def all_to_all(
    rows: torch.Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Send `sends[r]` rows to each rank r of a group, and receive `receives[r]` rows from it. None is one rank."""
    if group is None:
        return rows
    result = rows.new_empty(sum(receives), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), receives, sends, group=group)
    return result
