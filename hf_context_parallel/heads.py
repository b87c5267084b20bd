"""Whole sequences of some heads: what runs along a sequence, head by head, shares its work by head.

Each rank gets all tokens of its share of the heads, in place of all heads of its share of the tokens. All tensors of a
kind travel together, and results return the other way.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

import torch
import torch.distributed as dist

from .data import Shard
from .reshard import all_to_all, held, linear, scattered, sequences


def deal_heads(heads: int, size: int, turn: int) -> list[range]:
    """For each rank its heads: equally many, or one more. With fewer heads than ranks some have none.

    Args:
        turn: how far the shares are moved on. Modules take turns, so that no rank always has more.
    """
    edges = [slot * heads // size for slot in range(size + 1)]
    return [range(edges[slot], edges[slot + 1]) for slot in ((rank - turn) % size for rank in range(size))]


def shared_heads(shares: list[range], ratio: int) -> list[list[int]]:
    """For each rank, which heads of tensors that have one for every `ratio` of the dealt ones it reads.

    A head that ranks share goes to each. Where a share begins or ends inside such a group, all get one for every head
    of their own, since the groups of what they get would not be equal.
    """
    aligned = all(share.start % ratio == 0 and share.stop % ratio == 0 for share in shares)
    step = ratio if aligned else 1
    return [[head // ratio for head in share[::step]] for share in shares]


class Heads:
    """The exchange that gives each rank whole sequences of some heads, and its reverse.

    Args:
        shard: the batch as this rank has it.
        group: of the shard's ranks.

    `sequences` are all of the batch's, shortest first.
    """

    def __init__(self, shard: Shard, group: dist.ProcessGroup | None, device: torch.device):
        self._shard, self._group = shard, group
        self.sequences = sorted(sequences(shard), key=lambda sequence: sequence.length)
        by_rank = held(shard, self.sequences)
        self._counts = [len(tokens) for tokens, _ in by_rank]
        self._tokens = by_rank[shard.rank][0].to(device)
        self._reverse = torch.cat([places for _, places in by_rank]).to(device)
        self._order = self._reverse.argsort()

    def whole(self, tensors: Several[torch.Tensor], dealt: Several[Several[Several[int]]]) -> list[torch.Tensor]:
        """Each `[B, S_local, H, ...]` as the tokens of all sequences, one sequence after another: `[T, h, ...]`.

        Args:
            dealt: for each tensor and each rank, the heads that go there.
        """
        ordered = [_ordered(x, [head for heads in by_rank for head in heads]) for x, by_rank in zip(tensors, dealt)]
        travel = _Travel(self, [[len(heads) for heads in by_rank] for by_rank in dealt])
        return linear(travel.to_heads, travel.to_tokens, *ordered)

    def sharded(self, x: torch.Tensor, shares: Several[range]) -> torch.Tensor:
        """`[T, h, ...]` back as `[B, S_local, H, ...]`: 0 where a token is in no sequence.

        Args:
            shares: for each rank the heads that it comes with.
        """
        travel = _Travel(self, [[len(share) for share in shares]])
        x = linear(travel.to_tokens, travel.to_heads, x)[0]
        arrived = [head for share in shares for head in share]
        return _ordered(x, sorted(range(len(arrived)), key=arrived.__getitem__))


def _ordered(x: torch.Tensor, heads: list[int]) -> torch.Tensor:
    """These heads of `[B, S, H, ...]`."""
    if heads == list(range(x.shape[2])):
        return x
    return x.index_select(2, torch.tensor(heads, dtype=torch.long, device=x.device))


class _Travel:
    """Tensors on the way between tokens and heads.

    Args:
        sizes: for each tensor and each rank, how many heads go there, one rank's after another's.
    """

    def __init__(self, geometry: Heads, sizes: list[list[int]]):
        self._geometry, self._sizes = geometry, sizes

    def to_heads(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """`[B, S_local, H, ...]` each to `[T, h, ...]`."""
        geometry = self._geometry
        arrived: dict[int, torch.Tensor] = {}
        for indices in _alike(tensors):
            rows = [tensors[index].flatten(0, 1).index_select(0, geometry._tokens) for index in indices]
            blocks = [row.split(self._sizes[index], dim=1) for index, row in zip(indices, rows)]
            sent = [torch.cat([block.flatten(1) for block in to_rank], dim=1) for to_rank in zip(*blocks)]
            width = sent[geometry._shard.rank].shape[1]
            flat = all_to_all(
                torch.cat([block.flatten() for block in sent]),
                [block.numel() for block in sent],
                [count * width for count in geometry._counts],
                geometry._group,
            )
            whole = flat.view(sum(geometry._counts), width).index_select(0, geometry._order)
            mine = [block[geometry._shard.rank].shape[1:] for block in blocks]
            for index, shape, part in zip(indices, mine, whole.split([shape.numel() for shape in mine], dim=1)):
                arrived[index] = part.unflatten(1, shape)
        return [arrived[index] for index in range(len(tensors))]

    def to_tokens(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """`[T, h, ...]` each to `[B, S_local, H, ...]`, 0 where a token is in no sequence."""
        geometry = self._geometry
        arrived: dict[int, torch.Tensor] = {}
        for indices in _alike(tensors):
            rows = torch.cat([tensors[index].flatten(1) for index in indices], dim=1)
            per_head = [tensors[index].shape[2:].numel() for index in indices]
            widths = [
                [self._sizes[index][rank] * numbers for index, numbers in zip(indices, per_head)]
                for rank in range(len(geometry._counts))
            ]
            count = len(geometry._tokens)
            receives = [count * sum(of_rank) for of_rank in widths]
            flat = all_to_all(
                rows.index_select(0, geometry._reverse).flatten(),
                [other * rows.shape[1] for other in geometry._counts],
                receives,
                geometry._group,
            )
            blocks = [
                block.view(count, sum(of_rank)).split(of_rank, dim=1)
                for block, of_rank in zip(flat.split(receives), widths)
            ]
            for index, from_ranks in zip(indices, zip(*blocks)):
                local = scattered(geometry._shard, geometry._tokens, torch.cat(from_ranks, dim=1))
                arrived[index] = local.unflatten(2, (sum(self._sizes[index]), *tensors[index].shape[2:]))
        return [arrived[index] for index in range(len(tensors))]


def _alike(tensors: tuple[torch.Tensor, ...]) -> list[list[int]]:
    """Which tensors can travel in one message: those of a dtype."""
    kinds: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault(tensor.dtype, []).append(index)
    return list(kinds.values())
