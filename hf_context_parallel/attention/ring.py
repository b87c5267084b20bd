"""Execution of a plan: keys/values travel between ranks while attention is computed with those that have arrived.

The ring is that of Liu et al., "Ring Attention with Blockwise Transformers" (2023, arXiv:2310.01889). It transfers
only the keys that are read, as listed in the plan. A plan in which all keys arrive in one step is executed by the same
code.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..distributed.buffers import new_buffer
from ..distributed.messages import Exchange, Message, Pending, accumulation_dtype, in_flight
from ..distributed.rows import Rows
from ..distributed.side_stream import GradientStream
from ..planning.plan import Plan
from .kernels.base import Kernel
from .prepared import Parcel, PreparedPlan, PreparedStep, prepared
from .profiling import span
from .scores import Scores
from .sinks import add_sinks, sinks_gradient
from .totals import Output, Places, Sum
from .ulysses import SharedHeads


def planned_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    plan: Plan,
    exchange: Exchange,
    kernel: Kernel,
    scores: Scores,
    sinks: torch.Tensor | None = None,
    shared: SharedHeads | None = None,
) -> torch.Tensor:
    """Compute attention of this rank's queries to the keys that the plan lists, on all ranks.

    Args:
        query: `[T, H, D]`, the tokens of this rank, numbered as in the plan.
        key, value: `[T, H_kv, D]` and `[T, H_kv, D_v]`, of the same dtype. H_kv divides H.
        scores: rule for scores. Its seed differs between ranks.
        sinks: `[H]`, one more score for each head, with a value of 0 (learnable, `s_aux`).
        shared: exchange of heads in a subgroup. The plan then numbers the tokens of the subgroup that travel.

    Returns:
        `[T, H, D_v]` in the dtype of `query`; 0 for tokens that are in no call of the plan.
    """
    key_value = torch.cat([key, value], dim=-1)  # so that a transfer takes one message instead of two
    arguments = key.shape[-1], plan, exchange, kernel, scores, shared
    output: torch.Tensor = _Attention.apply(query.contiguous(), key_value, sinks, *arguments)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key_value: torch.Tensor,
        sinks: torch.Tensor | None,
        key_dim: int,
        plan: Plan,
        exchange: Exchange,
        kernel: Kernel,
        scores: Scores,
        shared: SharedHeads | None,
    ) -> torch.Tensor:
        dtype, heads = query.dtype, slice(None) if shared is None else slice(shared.mine.start, shared.mine.stop)
        with torch.autocast(query.device.type, enabled=False):
            if shared is not None:
                with span("forward", "to heads"):
                    query, key_value = shared.to_heads(query, key_value)
            output, lse = _forward(query, key_value, key_dim, plan, exchange, kernel, scores)
            if sinks is not None:
                lse = add_sinks(output, lse, sinks[heads])
            output = output.to(dtype)
        ctx.save_for_backward(query, key_value, sinks, output, lse)
        # Backward may run in a thread of autograd, where the active batch cannot be looked up. So it is all kept here.
        ctx.environment = (key_dim, plan, exchange, kernel, scores)
        ctx.shared, ctx.heads = shared, heads
        if shared is None:
            return output
        with span("forward", "to tokens"):
            return shared.output_to_tokens(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key_value, sinks, output, lse = ctx.saved_tensors
        shared, grad_sinks = ctx.shared, None
        with torch.autocast(grad_output.device.type, enabled=False):
            grad_output = grad_output.contiguous()
            if shared is not None:
                with span("backward", "to heads"):
                    grad_output = shared.output_to_heads(grad_output)
            grad_query, grad_key_value = _backward(grad_output, query, key_value, output, lse, *ctx.environment)
            if sinks is not None:
                grad_sinks = torch.zeros_like(sinks)
                grad_sinks[ctx.heads] = sinks_gradient(grad_output, output, lse, sinks[ctx.heads])
            if shared is not None:
                grad_key_value = grad_key_value.to(shared.gradient_dtype(key_value.dtype, grad_key_value.dtype))
                with span("backward", "to tokens"):
                    grad_query, grad_key_value = shared.to_tokens(grad_query, grad_key_value)
        return grad_query, grad_key_value.to(key_value.dtype), grad_sinks, *[None] * 7


def _forward(
    query: torch.Tensor,
    key_value: torch.Tensor,
    key_dim: int,
    plan: Plan,
    exchange: Exchange,
    kernel: Kernel,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output `[T, H, D_v]`, and its LSE `[T, H]` in the accumulation dtype."""
    ready, number_of_call = prepared(plan), 0
    output = Output(ready.queries)
    with in_flight(exchange) as exchange:
        for number, step, keys in _exchanged("forward", ready, exchange, key_value):
            for index, call in enumerate(step.step.calls):
                with span("forward", "compute", number):
                    key, value = _split(keys, key_dim)
                    part = kernel.forward(query, key, value, call, scores.of(number, index))
                with span("forward", "merge", number):
                    output.add(number_of_call, *part)
                number_of_call += 1
                del key, value, part
            del keys  # else it would be a fourth buffer while the next one is allocated
    if output.value is not None:
        return output.value
    # This rank holds only padding.
    empty = query.new_zeros(*query.shape[:2], key_value.shape[-1] - key_dim)
    return empty, query.new_full(query.shape[:2], float("-inf"), dtype=accumulation_dtype(query.dtype))


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key_value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    key_dim: int,
    plan: Plan,
    exchange: Exchange,
    kernel: Kernel,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of the query and of this rank's keys/values.

    Returns:
        `[T, H, D]` in the dtype of the query, and `[T, H_kv, D + D_v]` in the accumulation dtype if they are sums.
    """
    ready, stream, number_of_call = prepared(plan), GradientStream(query.device), 0
    grad_query = Sum(ready.queries)
    previous: PreparedStep | None = None
    grad_own: torch.Tensor | None = None
    leaving: torch.Tensor | None = None
    after: list[tuple[int, None, None]] = [(len(ready.steps), None, None)]
    number: int
    step: PreparedStep | None
    keys: torch.Tensor | None
    with in_flight(exchange) as exchange:
        for number, step, keys in chain(_exchanged("backward", ready, exchange, key_value), after):
            with stream, span("backward", "send sums", number):
                joined, returned, pending = _post_gradients(exchange, ready, previous, leaving, step)
            sent = leaving
            if step is not None and keys is not None:
                grad_keys = _KeySums(step.keys, keys, key_dim, ready.travels)
                for index, call in enumerate(step.step.calls):
                    key, value = _split(keys, key_dim)
                    arguments = grad_output, query, key, value, output, lse, call, scores.of(number, index)
                    with span("backward", "compute", number):
                        dq, dk, dv = kernel.backward(*arguments)
                    with span("backward", "merge", number):
                        grad_query.add(number_of_call, dq)
                        grad_keys.add(index, dk, dv)
                    number_of_call += 1
                    del arguments, key, value, dq, dk, dv
                leaving = grad_keys.total()
            del keys
            stream.follow()
            with stream:
                with span("backward", "wait sums", number):
                    pending.wait()
                with span("backward", "add sums", number):
                    _add(leaving, joined)
                    _add(grad_own, returned)
            stream.keep(sent)
            grad_own = leaving if grad_own is None else grad_own
            previous = step
            del joined, returned, sent  # else they would be alive while the next ones are allocated
    stream.join()
    assert grad_own is not None  # a plan has at least one step
    total = torch.zeros_like(query) if grad_query.value is None else grad_query.value
    return total.to(query.dtype), grad_own


def _exchanged(
    direction: str, plan: PreparedPlan, exchange: Exchange, own: torch.Tensor
) -> Iterator[tuple[int, PreparedStep, torch.Tensor]]:
    """Yield each step with its number and its keys. The next keys travel while the caller computes with these.

    At most three buffers are alive: this rank's own keys, the keys of this step, and the keys that arrive. If messages
    hold scattered rows, these land in a fourth one. Around this generator `enumerate` would keep one more, since it
    frees an item only when it has the next one.
    """
    held = own
    for number, (step, upcoming) in enumerate(zip(plan.steps, (*plan.steps[1:], None))):
        if upcoming is None:
            yield number, step, held
            return
        with span(direction, "send", number):
            arriving = new_buffer(own, upcoming.step.tokens, *own.shape[1:])
            landings, apart = upcoming.receives.landings(arriving)
            sends = [(parcel.peer, parcel.taken(held)) for parcel in upcoming.forwards]
            sends += [(parcel.peer, parcel.taken(own)) for parcel in upcoming.direct_sends]
            pending = _post(exchange, plan, sends, landings)
            del sends, landings  # else they would keep keys alive when buffers of later steps are allocated
        yield number, step, held
        with span(direction, "wait", number):
            pending.wait()
        with span(direction, "order", number):
            upcoming.receives.settle(apart, arriving)
        held = arriving
        del apart, arriving


def _post_gradients(
    exchange: Exchange,
    plan: PreparedPlan,
    previous: PreparedStep | None,
    leaving: torch.Tensor | None,
    step: PreparedStep | None,
) -> tuple[list[tuple[Rows, torch.Tensor]], list[tuple[Rows, torch.Tensor]], Pending]:
    """Send the gradient sums `leaving` of the step before, and receive others.

    Returns:
        The sums to add to those of this step, the sums of this rank's own keys that return, and the messages.
    """
    if previous is None or leaving is None:
        return [], [], Pending()

    def expect(parcels: list[Parcel], like: torch.Tensor = leaving) -> list[tuple[Parcel, torch.Tensor]]:
        return [(parcel, new_buffer(like, parcel.tokens, *like.shape[1:])) for parcel in parcels]

    joined, returned = expect(step.grad_receives if step else []), expect(previous.grad_returns)
    sends = [(parcel.peer, parcel.taken(leaving)) for parcel in previous.grad_sends]
    pending = _post(exchange, plan, sends, [(parcel.peer, part) for parcel, part in joined + returned])
    rows_joined = [(parcel.rows, part) for parcel, part in joined]
    return rows_joined, [(parcel.rows, part) for parcel, part in returned], pending


def _split(keys: torch.Tensor, key_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the keys and of the values in packed keys/values."""
    key, value = keys.split_with_sizes((key_dim, keys.shape[-1] - key_dim), -1)
    return key, value


def _add(sums: torch.Tensor | None, parts: list[tuple[Rows, torch.Tensor]]) -> None:
    """Add the parts that have arrived to their rows of `sums`, which may be None if there are no parts."""
    for rows, part in parts:
        assert sums is not None
        Rows.move(part, None, sums, rows, add=True)


def _post(exchange: Exchange, plan: PreparedPlan, sends: list[Message], receives: list[Message]) -> Pending:
    """Post messages to other ranks, and copy the messages of this rank to itself."""
    rank = plan.rank
    if not plan.sends_itself:
        return exchange.post(sends, receives)
    pending = exchange.post(*([m for m in messages if m[0] != rank] for messages in (sends, receives)))
    mine = ([tensor for peer, tensor in messages if peer == rank] for messages in (sends, receives))
    for source, target in zip(*mine):
        target.copy_(source)
    return pending


class _KeySums:
    """Sums of the gradients of a step's keys/values, `[tokens, H_kv, D + D_v]`.

    They are in the accumulation dtype. If each row is of one call and nothing travels, they are in the dtype of the
    call.
    """

    def __init__(self, places: Places, keys: torch.Tensor, key_dim: int, travels: bool):
        self._places, self._key_dim = places, key_dim
        self._shape, self._like = keys.shape, keys.new_empty(0)  # and not the keys, so that they are freed
        self._adds = travels or places.most > 1
        self._total: torch.Tensor | None = None
        self._sums: list[Sum] = []

    def add(self, number: int, *parts: torch.Tensor) -> None:
        """Add the gradients of keys and of values of call `number`."""
        if self._total is None:
            dtype = accumulation_dtype(parts[0].dtype) if self._adds else parts[0].dtype
            self._total = self._allocate(dtype)
            if self._places.most == 1 and self._places.is_all(number):
                torch.cat(parts, dim=-1, out=self._total)
                return
            self._sums = [Sum(self._places, view) for view in _split(self._total, self._key_dim)]
        for total, part in zip(self._sums, parts):
            total.add(number, part)

    def total(self) -> torch.Tensor:
        """The sums, once all calls are added."""
        return self._allocate(accumulation_dtype(self._like.dtype)) if self._total is None else self._total

    def _allocate(self, dtype: torch.dtype) -> torch.Tensor:
        total = new_buffer(self._like, *self._shape, dtype=dtype)
        return total if self._places.complete else total.zero_()
