"""Plans made ready to be executed: messages and rows are computed once for a plan, and not in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..distributed.buffers import new_buffer
from ..distributed.messages import Exchange, Message, new_landing
from ..distributed.rows import Rows, cut
from ..planning.plan import Plan, Transfer
from ..planning.portions import portions_of
from ..planning.tiles import Segments
from .totals import Places

LONG = 5000
"""Mean number of keys of a query from which buffers on the CPU are made anew in each layer.

That takes time for each token, and kernels take time for each pair. So the longer a document is, the less does it
matter, while what is kept for the next layer adds to the memory of all else."""


class Parcels:
    """Messages, and the rows of a buffer that each of them holds.

    Args:
        transfers: the messages, as the plan describes them, in the order in which they are posted.
        rank: this rank. Messages to itself are copied.
    """

    def __init__(self, transfers: Sequence[Transfer], rank: int):
        self._rank = rank
        self.peers = [transfer.peer for transfer in transfers]
        self.rows = [Rows.of_runs(transfer.rows) for transfer in transfers]
        self._sizes = [len(rows) for rows in self.rows]
        self._parcels = [(peer, rows.run, rows) for peer, rows in zip(self.peers, self.rows)]

    def taken(self, buffer: torch.Tensor) -> list[Message]:
        """Messages to send: views of the buffer where their rows are one run."""
        return [(peer, rows.of(buffer) if run is None else cut(buffer, run)) for peer, run, rows in self._parcels]

    def apart(self, exchange: Exchange, like: torch.Tensor) -> list[torch.Tensor]:
        """Make a tensor for each message that arrives, with rows like those of a buffer."""
        return [
            new_buffer(like, size, *like.shape[1:])
            if peer == self._rank
            else new_landing(exchange, like, size, *like.shape[1:])
            for peer, size in zip(self.peers, self._sizes)
        ]


class Arrivals:
    """Messages that fill rows of a buffer. Those whose rows are not one run land apart, and are moved at once.

    Args:
        transfers: the messages, in the order in which they are posted.
        rank: this rank. Messages to itself are copied.
    """

    def __init__(self, transfers: Sequence[Transfer], rank: int):
        self._is_one = len(transfers) == 1 and transfers[0].peer != rank
        scattered = [transfer.rows for transfer in transfers if len(transfer.rows) > 1]
        self._apart = Rows.of_runs([run for rows in scattered for run in rows]) if scattered else None
        self._landings: list[tuple[int, slice, bool]] = []
        """Rank that sends a message, the rows where it lands, and whether they are rows of memory apart."""
        offset = 0
        for transfer in transfers:
            lands_apart = len(transfer.rows) > 1
            start, stop = (offset, offset + transfer.tokens) if lands_apart else transfer.rows[0]
            self._landings.append((transfer.peer, slice(start, stop), lands_apart))
            offset += transfer.tokens if lands_apart else 0

    def landings(
        self, exchange: Exchange, like: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor, list[Message], torch.Tensor | None]:
        """Make a buffer of `tokens` rows like those of a tensor, and a second one for messages that land apart.

        Either is one of `new_landing` if one message fills it.

        Returns:
            The buffer, where each message lands, and the second buffer or None.
        """

        def made(rows: int, is_filled_by_one: bool) -> torch.Tensor:
            shape = rows, *like.shape[1:]
            return new_landing(exchange, like, *shape) if is_filled_by_one else new_buffer(like, *shape)

        if self._apart is None:
            buffer, apart = made(tokens, self._is_one and self._landings[0][1] == slice(0, tokens)), None
        else:
            buffer, apart = made(tokens, False), made(len(self._apart), self._is_one)
        found = [
            (peer, cut(buffer if apart is None or not aside else apart, rows)) for peer, rows, aside in self._landings
        ]
        return buffer, found, apart

    def rows(self) -> list[Rows]:
        """All rows whose numbers are kept."""
        return [] if self._apart is None else [self._apart]

    def settle(self, apart: torch.Tensor, buffer: torch.Tensor) -> None:
        """Move messages that landed apart to their rows of the buffer."""
        Rows.move(apart, None, buffer, self._apart)


@dataclass(frozen=True)
class SumMessages:
    """Messages of gradient sums after a step; see `Step`.

    Args:
        sends: sums of the step that are sent on.
        joined: sums that are added to those of the next step.
        returned: sums of this rank's own keys.
    """

    sends: Parcels
    joined: Parcels
    returned: Parcels


@dataclass(frozen=True)
class PreparedStep:
    """Step whose messages are ready; see `Step` for the arguments of the same names.

    Args:
        number: number of the step in the plan.
        is_empty: True if this rank has no keys in the step, and sends none for it.
        keys: rows of the key buffer that each call adds gradients to.
        sums: messages of gradient sums after this step, or None if there are none.
    """

    number: int
    tokens: int
    calls: tuple[Segments, ...]
    receives: Arrivals
    forwards: Parcels
    direct_sends: Parcels
    is_empty: bool
    keys: Places
    sums: SumMessages | None

    def rows(self) -> list[Rows]:
        """All rows of the step whose numbers are kept."""
        sums = () if self.sums is None else (self.sums.sends, self.sums.joined, self.sums.returned)
        parcels = [rows for each in (self.forwards, self.direct_sends, *sums) for rows in each.rows]
        return [*self.receives.rows(), *parcels, *self.keys.all_rows()]


@dataclass(frozen=True)
class PreparedPlan:
    """Plan whose messages and rows are ready.

    Args:
        steps: the steps, each with the one that follows it.
        queries: rows of the queries that each call computes, calls of all steps in order.
        travels: True if keys travel between ranks or within this rank.
        sends_itself: True if a message goes from this rank to itself.
        keeps_buffers: False if buffers of a CPU are not worth keeping for the next layer.
    """

    rank: int
    steps: list[tuple[PreparedStep, PreparedStep | None]]
    queries: Places
    travels: bool
    sends_itself: bool
    keeps_buffers: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the row numbers that are kept on the host."""
        rows = [*self.queries.all_rows(), *(rows for step, _ in self.steps for rows in step.rows())]
        return sum(each.nbytes for each in rows)


def prepared(plan: Plan) -> PreparedPlan:
    """Make a plan ready. This is done once for each plan."""
    found: PreparedPlan | None = plan.kept.get("prepared")
    if found is None:
        found = plan.kept["prepared"] = _prepared(plan)
    return found


def _prepared(plan: Plan) -> PreparedPlan:
    after = [step.grad_receives for step in plan.steps[1:]]
    steps = [
        PreparedStep(
            number=number,
            tokens=step.tokens,
            calls=step.calls,
            receives=Arrivals(step.receives, plan.rank),
            forwards=Parcels(step.forwards, plan.rank),
            direct_sends=Parcels(step.direct_sends, plan.rank),
            is_empty=not (step.tokens or step.forwards or step.direct_sends),
            keys=Places(portions_of([call.key_runs for call in step.calls], step.tokens)),
            sums=_sum_messages(plan.rank, step.grad_sends, joined, step.grad_returns),
        )
        for number, (step, joined) in enumerate(zip(plan.steps, [*after, ()]))
    ]
    calls = [call.query_runs for step in plan.steps for call in step.calls]
    return PreparedPlan(
        rank=plan.rank,
        steps=list(zip(steps, [*steps[1:], None])),
        queries=Places(portions_of(calls, plan.tokens)),
        travels=any(step.grad_sends or step.grad_returns for step in plan.steps),
        sends_itself=any(t.peer == plan.rank for step in plan.steps for t in (*step.receives, *step.grad_returns)),
        keeps_buffers=plan.pairs < LONG * plan.tokens,
    )


def _sum_messages(rank: int, *transfers: Sequence[Transfer]) -> SumMessages | None:
    return SumMessages(*(Parcels(each, rank) for each in transfers)) if any(transfers) else None
