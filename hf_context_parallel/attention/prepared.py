"""Plans made ready to be executed: messages and rows are computed once for a plan, and not in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..distributed.buffers import new_buffer
from ..distributed.messages import Message
from ..distributed.rows import Rows, cut
from ..planning.plan import Plan, Step, Transfer
from ..planning.portions import portions_of
from .totals import Places


class Parcel:
    """One message, and the rows of a buffer that it holds.

    Args:
        transfer: the message, as the plan describes it.
    """

    def __init__(self, transfer: Transfer):
        self.peer, self.tokens = transfer.peer, transfer.tokens
        self.rows = Rows.of_runs(transfer.rows)

    def taken(self, buffer: torch.Tensor) -> torch.Tensor:
        """Contents of the message: a view of the buffer if its rows are one run."""
        return self.rows.of(buffer)


class Arrivals:
    """Messages that fill rows of a buffer. Those whose rows are not one run land apart, and are moved at once.

    Args:
        transfers: the messages, in the order in which they are posted.
    """

    def __init__(self, transfers: Sequence[Transfer]):
        self.parcels = [Parcel(transfer) for transfer in transfers]
        scattered = [transfer.rows for transfer in transfers if len(transfer.rows) > 1]
        self._rows = Rows.of_runs([run for rows in scattered for run in rows]) if scattered else None

    def landings(self, buffer: torch.Tensor) -> tuple[list[Message], torch.Tensor | None]:
        """Return where each message lands: rows of the buffer, or rows of a second tensor, which is returned too."""
        apart = None if self._rows is None else new_buffer(buffer, len(self._rows), *buffer.shape[1:])
        messages, offset = [], 0
        for parcel in self.parcels:
            run = parcel.rows.run
            if run is None:
                run, target = slice(offset, offset + parcel.tokens), apart
                offset += parcel.tokens
            else:
                target = buffer
            assert target is not None  # since a message is scattered
            messages.append((parcel.peer, cut(target, run)))
        return messages, apart

    def rows(self) -> list[Rows]:
        """All rows that the messages fill."""
        return [*(parcel.rows for parcel in self.parcels), *([] if self._rows is None else [self._rows])]

    def settle(self, apart: torch.Tensor | None, buffer: torch.Tensor) -> None:
        """Move messages that landed apart to their rows of the buffer."""
        if apart is not None:
            Rows.move(apart, None, buffer, self._rows)


@dataclass(frozen=True)
class PreparedStep:
    """Step whose messages are ready; see `Step` for the arguments of the same names.

    Args:
        keys: rows of the key buffer that each call adds gradients to.
    """

    step: Step
    receives: Arrivals
    forwards: list[Parcel]
    direct_sends: list[Parcel]
    grad_receives: list[Parcel]
    grad_sends: list[Parcel]
    grad_returns: list[Parcel]
    keys: Places

    def rows(self) -> list[Rows]:
        """All rows of the step."""
        parcels = self.forwards, self.direct_sends, self.grad_receives, self.grad_sends, self.grad_returns
        found = [parcel.rows for each in parcels for parcel in each]
        return [*self.receives.rows(), *found, *self.keys.all_rows()]


@dataclass(frozen=True)
class PreparedPlan:
    """Plan whose messages and rows are ready.

    Args:
        queries: rows of the queries that each call computes, calls of all steps in order.
        travels: True if keys travel between ranks or within this rank.
        sends_itself: True if a message goes from this rank to itself.
    """

    rank: int
    steps: list[PreparedStep]
    queries: Places
    travels: bool
    sends_itself: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the row numbers that are kept on the host."""
        return sum(
            rows.nbytes for rows in [*self.queries.all_rows(), *(r for step in self.steps for r in step.rows())]
        )


def prepared(plan: Plan) -> PreparedPlan:
    """Make a plan ready. This is done once for each plan."""
    if "prepared" not in plan.kept:
        steps = [
            PreparedStep(
                step=step,
                receives=Arrivals(step.receives),
                forwards=_parcels(step.forwards),
                direct_sends=_parcels(step.direct_sends),
                grad_receives=_parcels(step.grad_receives),
                grad_sends=_parcels(step.grad_sends),
                grad_returns=_parcels(step.grad_returns),
                keys=Places(portions_of([call.key_runs for call in step.calls], step.tokens)),
            )
            for step in plan.steps
        ]
        calls = [call.query_runs for step in plan.steps for call in step.calls]
        travels = any(step.grad_sends or step.grad_returns for step in plan.steps)
        itself = any(t.peer == plan.rank for step in plan.steps for t in (*step.receives, *step.grad_returns))
        queries = Places(portions_of(calls, plan.tokens))
        plan.kept["prepared"] = PreparedPlan(plan.rank, steps, queries, travels, itself)
    found: PreparedPlan = plan.kept["prepared"]
    return found


def _parcels(transfers: Sequence[Transfer]) -> list[Parcel]:
    return [Parcel(transfer) for transfer in transfers]
