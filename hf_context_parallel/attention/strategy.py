"""Strategies: ways in which the ranks of a group compute a mask, and the bytes that they send.

    p2p          a ring: keys/values travel from rank to rank
    all_gather   all keys/values that a rank reads arrive at once
    a2a          all heads of a rank's tokens become all tokens of a rank's heads
    a2a+p2p      a2a inside subgroups of neighbouring ranks, a ring of the subgroups (Fang and Zhao, "USP", 2024,
                 arXiv:2405.07719)

In the plan, a subgroup is one rank of a smaller layout, and holds all chunks of its ranks. So a2a is a plan for a
single rank between two exchanges of heads. And p2p is a plan for subgroups of one rank, without exchanges of heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from ..distributed.messages import Exchange, Subset, accumulation_dtype
from ..distributed.rows import Rows
from ..distributed.token_exchange import TokenExchange
from ..planning.layout import Layout
from ..planning.mask import Document, Mask, readers_in_padding
from ..planning.plan import Plan, build_gathering_plan, build_own_plan, build_plan
from .prepared import prepared
from .ulysses import SharedHeads


class Shape(NamedTuple):
    """Heads, head dims and dtype of a layer. Keys have `query_dim`, values have `value_dim`."""

    heads: int
    key_heads: int
    query_dim: int
    value_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Shape:
        """Shape of a layer with tensors `[..., H, T, D]`."""
        return cls(query.shape[-3], key.shape[-3], query.shape[-1], value.shape[-1], query.dtype)

    @property
    def key_value_numbers(self) -> int:
        """Numbers of the keys/values of a token."""
        return self.key_heads * (self.query_dim + self.value_dim)


class Sent(NamedTuple):
    """Bytes that a rank sends to other ranks for a layer."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Strategy:
    """Part of one rank in computing a mask.

    Args:
        comm_type: name of the strategy.
        rank: this rank of the group.
        inner: number of ranks of a subgroup, which exchange heads.
        tokens: number of tokens that this rank holds, all rows counted.
        plan: plan for the tokens of the subgroup, with the other subgroups. None if no document travels.
        own: plan for the documents that lie on this rank alone, if heads are exchanged and there are such documents.
        padding: plan for the queries of padding, which read the tokens of their row, if their outputs are wanted.
        exchanged: tokens that travel from each rank of the subgroup, as rows of that rank.
        places: the same tokens as rows of the plan.
        groups: number of groups of heads that are computed one after another. The same on all ranks.
    """

    comm_type: str
    rank: int
    inner: int
    tokens: int
    plan: Plan | None
    own: Plan | None = None
    padding: Plan | None = None
    exchanged: tuple[Rows, ...] = ()
    places: tuple[Rows, ...] = ()
    groups: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the row numbers that are kept on the host to execute this strategy."""
        plans = [prepared(plan).nbytes for plan in (self.plan, self.own, self.padding) if plan is not None]
        return sum(plans) + sum(rows.nbytes for rows in (*self.exchanged, *self.places, *self.places))

    def outer(self, exchange: Exchange) -> Exchange:
        """Messages between this rank and the ranks that have its place in other subgroups."""
        if self.inner == 1:
            return exchange
        assert self.plan is not None  # without a plan there are no messages
        return Subset(exchange, range(self.rank % self.inner, self.plan.size * self.inner, self.inner))

    def shared_heads(
        self, exchange: Exchange | None, heads: int, key_heads: int, device: torch.device
    ) -> SharedHeads | None:
        """Exchange of heads in the subgroup of this rank, or None for subgroups of one rank."""
        if self.inner == 1:
            return None
        made = exchange, heads, key_heads, device
        if made not in self._kept:
            self._kept[made] = self._shared_heads(*made)
        return self._kept[made]

    @cached_property
    def _kept(self) -> dict[tuple[Exchange | None, int, int, torch.device], SharedHeads]:
        """Exchanges of heads of earlier layers, since all layers of a kind have the same."""
        return {}

    def _shared_heads(
        self, exchange: Exchange | None, heads: int, key_heads: int, device: torch.device
    ) -> SharedHeads:
        assert self.plan is not None  # without a plan no heads are exchanged
        first, mine = self.rank - self.rank % self.inner, self.rank % self.inner
        return SharedHeads(
            TokenExchange(
                exchange=None if exchange is None else Subset(exchange, range(first, first + self.inner)),
                rank=mine,
                rows=self.tokens,
                tokens=None if len(self.exchanged[mine]) == self.tokens else self.exchanged[mine],
                counts=[len(rows) for rows in self.exchanged],
                places=self.places,
                whole=self.plan.tokens,
            ),
            heads,
            key_heads,
            device,
        )

    def refusal(self, heads: int) -> str | None:
        """Reason why this strategy cannot compute a layer of `heads` query heads, or None if it can."""
        if heads >= self.inner:
            return None
        return (
            f"comm_type={self.comm_type!r} deals heads to {self.inner} ranks, but this layer has {heads} query heads. "
            f"Use comm_type='a2a+p2p' with an a2a_size of at most {heads} that divides the group's size, or 'p2p' or "
            "'all_gather'"
        )

    def sent(self, shape: Shape) -> Sent:
        """Bytes that this rank sends for a layer of this shape. Recomputation is not counted."""
        if self.plan is None:
            return Sent(0, 0)
        shared = self.shared_heads(None, shape.heads, shape.key_heads, torch.device("cpu"))
        heads = Sent(0, 0) if shared is None else bytes_of_heads(shape, shared)
        key_heads = shape.key_heads if shared is None else shared.key_heads
        keys = bytes_of_keys(shape, key_heads, self.plan.sent_keys, self.plan.sent_gradients)
        return Sent(heads.forward + keys.forward, heads.backward + keys.backward)


def bytes_of_keys(shape: Shape, key_heads: int, keys: int, gradients: int) -> Sent:
    """Bytes of keys/values and of the partial sums of their gradients.

    Args:
        key_heads: key heads of a rank.
        keys: tokens that travel in each of the two passes.
        gradients: tokens whose gradients travel.
    """
    numbers, sums = key_heads * (shape.query_dim + shape.value_dim), accumulation_dtype(shape.dtype).itemsize
    once = keys * numbers * shape.dtype.itemsize
    return Sent(once, once + gradients * numbers * sums)


def bytes_of_heads(shape: Shape, shared: SharedHeads) -> Sent:
    """Bytes that a rank sends to exchange heads: queries, keys, values, outputs and their gradients."""
    size, width = shape.dtype.itemsize, shape.query_dim + shape.value_dim
    forward = size * (shared.leaving(shape.query_dim, width) + shared.returning(shape.value_dim))
    backward = size * (shared.leaving(shape.value_dim) + shared.returning(shape.query_dim))
    sums = shared.gradient_dtype(shape.dtype, accumulation_dtype(shape.dtype)).itemsize
    return Sent(forward, backward + sums * shared.returning(0, width))


def with_padding(strategy: Strategy, layout: Layout, mask: Mask) -> Strategy:
    """Let a strategy compute the queries of padding too, in a ring of their own."""
    pair = readers_in_padding(mask)
    return strategy if pair is None else replace(strategy, padding=build_plan(layout, pair[0], strategy.rank, pair[1]))


def build_strategy(
    comm_type: str, inner: int, layout: Layout, mask: Mask, rank: int, together: int = 1, groups: int = 1
) -> Strategy:
    """Make the part of `rank` in computing `mask` by the strategy `comm_type`.

    Args:
        inner: number of ranks of a subgroup, which exchange heads. It divides the size of the layout. It is 1 for p2p
            and all_gather.
        together: number of owners whose keys a ring computes with at each step. It is the same on all ranks.
        groups: number of groups of heads that are computed one after another. It is the same on all ranks.
    """
    tokens = len(mask.rows) * layout.local_length(rank)
    if comm_type == "all_gather":
        return Strategy(comm_type, rank, 1, tokens, build_gathering_plan(layout, mask, rank), groups=groups)
    if inner == 1:
        return Strategy(comm_type, rank, 1, tokens, build_plan(layout, mask, rank, together=together), groups=groups)
    apart, exchanged = _split(layout, mask)
    own: Plan | None = build_own_plan(layout, apart, rank)
    if not any(exchanged.rows):
        return Strategy(comm_type, rank, inner, tokens, None, own, groups=groups)
    own = own if own is not None and own.pairs else None
    merged, first = layout.merged(inner), rank - rank % inner
    whole = merged.positions(rank // inner)
    moving, places = [], []
    for other in range(first, first + inner):
        positions = layout.positions(other)
        travels = torch.stack([_within(row, layout.length)[positions] for row in exchanged.rows])
        rows = torch.arange(len(mask.rows))[:, None] * len(whole)
        moving.append(Rows(travels.flatten().nonzero().flatten()))
        places.append(Rows((rows + torch.searchsorted(whole, positions))[travels]))
    plan = build_plan(merged, exchanged, rank // inner, together=together)
    return Strategy(comm_type, rank, inner, tokens, plan, own, None, tuple(moving), tuple(places), groups)


def _split(layout: Layout, mask: Mask) -> tuple[Mask, Mask]:
    """Split a mask in two: documents (or chunks of them) that lie on one rank each, and all others."""
    rows = mask.apart()
    alone = [[_ranks(layout, document) == 1 for document in row] for row in rows]
    pattern = mask.pattern._replace(chunk_size=None)

    def chosen(wanted: bool) -> Mask:
        kept = (tuple(d for d, flag in zip(*pair) if flag is wanted) for pair in zip(rows, alone))
        return Mask(mask.length, tuple(kept), pattern)

    return chosen(True), chosen(False)


def _ranks(layout: Layout, document: Document) -> int:
    """Number of ranks that hold tokens of a document."""
    return len({owner for start, stop in document for owner in layout.owners(start, stop)})


def _within(documents: tuple[Document, ...], length: int) -> torch.Tensor:
    """Boolean tensor `[length]`, True at the positions of the documents."""
    within = torch.zeros(length, dtype=torch.bool)
    for document in documents:
        for start, stop in document:
            within[start:stop] = True
    return within
