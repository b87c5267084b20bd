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

from ..distributed.messages import Exchange, Message, Pending, accumulation_dtype
from ..distributed.side_stream import GradientStream
from ..planning.intervals import Interval
from ..planning.plan import Plan, Step, Transfer
from .kernels.base import Kernel
from .merge import begin, merge_
from .profiling import span
from .scores import Scores
from .sinks import sinks_gradient, with_sinks
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
                with span("forward/to heads"):
                    query, key_value = shared.to_heads(query, key_value)
            output, lse = _forward(query, key_value, key_dim, plan, exchange, kernel, scores)
            if sinks is not None:
                output, lse = with_sinks(output, lse, sinks[heads])
            output = output.to(dtype)
        ctx.save_for_backward(query, key_value, sinks, output, lse)
        # Backward may run in a thread of autograd, where the active batch cannot be looked up. So it is all kept here.
        ctx.environment = (key_dim, plan, exchange, kernel, scores)
        ctx.shared, ctx.heads = shared, heads
        if shared is None:
            return output
        with span("forward/to tokens"):
            return shared.output_to_tokens(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key_value, sinks, output, lse = ctx.saved_tensors
        shared, grad_sinks = ctx.shared, None
        with torch.autocast(grad_output.device.type, enabled=False):
            grad_output = grad_output.contiguous()
            if shared is not None:
                with span("backward/to heads"):
                    grad_output = shared.output_to_heads(grad_output)
            grad_query, grad_key_value = _backward(grad_output, query, key_value, output, lse, *ctx.environment)
            if sinks is not None:
                grad_sinks = torch.zeros_like(sinks)
                grad_sinks[ctx.heads] = sinks_gradient(grad_output, output, lse, sinks[ctx.heads])
            if shared is not None:
                grad_key_value = grad_key_value.to(shared.gradient_dtype(key_value.dtype, grad_key_value.dtype))
                with span("backward/to tokens"):
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
    """Compute the output `[T, H, D_v]` and its LSE `[T, H]`, in the accumulation dtype."""
    dtype, tokens = accumulation_dtype(query.dtype), len(query)
    output: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    for number, step, keys in _exchanged("forward", plan, exchange, key_value):
        for index, call in enumerate(step.calls):
            with span(f"forward/step{number}/compute"):
                part, part_lse = kernel.forward(
                    query, keys[..., :key_dim], keys[..., key_dim:], call, scores.of(number, index)
                )
            with span(f"forward/step{number}/merge"):
                if output is None or lse is None:
                    output, lse = begin(tokens, call.query_runs, part, part_lse, dtype)
                else:
                    merge_(output, lse, call.query_runs, part, part_lse)
            del part, part_lse
        del keys  # else it would be a fourth buffer while the next one is allocated
    if output is None or lse is None:  # this rank holds only padding
        output = query.new_zeros(*query.shape[:2], key_value.shape[-1] - key_dim, dtype=dtype)
        lse = query.new_full(query.shape[:2], float("-inf"), dtype=dtype)
    return output, lse


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
        `[T, H, D]` in the dtype of the query, and `[T, H_kv, D + D_v]` in the accumulation dtype.
    """
    dtype, stream = accumulation_dtype(query.dtype), GradientStream(query.device)
    grad_query = _Sum(query, dtype)
    previous: Step | None = None
    grad_own: torch.Tensor | None = None
    leaving: torch.Tensor | None = None
    exchanged: Iterator[tuple[int, Step, torch.Tensor]] = _exchanged("backward", plan, exchange, key_value)
    after: list[tuple[int, None, None]] = [(len(plan.steps), None, None)]
    number: int
    step: Step | None
    keys: torch.Tensor | None
    for number, step, keys in chain(exchanged, after):
        with stream, span(f"backward/step{number}/send sums"):
            joined, returned, pending = _post_gradients(exchange, plan.rank, previous, leaving, step)
        sent = leaving
        if step is not None and keys is not None:
            grad_keys = _Sum(keys, dtype)
            for index, call in enumerate(step.calls):
                key, value = keys[..., :key_dim], keys[..., key_dim:]
                arguments = grad_output, query, key, value, output, lse, call, scores.of(number, index)
                with span(f"backward/step{number}/compute"):
                    dq, dk, dv = kernel.backward(*arguments)
                with span(f"backward/step{number}/merge"):
                    grad_query.add(call.query_runs, dq)
                    grad_keys.add(call.key_runs, torch.cat([dk, dv], dim=-1))
                del arguments, key, value, dq, dk, dv
            leaving = grad_keys.total()
        del keys
        stream.follow()
        with stream:
            with span(f"backward/step{number}/wait sums"):
                pending.wait()
            with span(f"backward/step{number}/add sums"):
                _add(leaving, joined)
                _add(grad_own, returned)
        stream.keep(sent)
        grad_own = leaving if grad_own is None else grad_own
        previous = step
        del joined, returned, sent  # else they would be alive while the next ones are allocated
    stream.join()
    assert grad_own is not None  # a plan has at least one step
    return grad_query.total().to(query.dtype), grad_own


def _exchanged(
    direction: str, plan: Plan, exchange: Exchange, own: torch.Tensor
) -> Iterator[tuple[int, Step, torch.Tensor]]:
    """Yield each step with its number and its keys. The next keys travel while the caller computes with these.

    At most three buffers are alive: this rank's own keys, the keys of this step, and the keys that arrive. Around this
    generator `enumerate` would keep a fourth, since it frees an item only when it has the next one.
    """
    held = own
    for number, (step, upcoming) in enumerate(zip(plan.steps, (*plan.steps[1:], None))):
        if upcoming is None:
            yield number, step, held
            return
        with span(f"{direction}/step{number}/send"):
            arriving = own.new_empty(upcoming.tokens, *own.shape[1:])
            sends = _messages(upcoming.forwards, held) + _messages(upcoming.direct_sends, own)
            pending = _post(exchange, plan.rank, sends, _messages(upcoming.receives, arriving))
            del sends  # else they would keep the keys of this step alive when buffers of later steps are allocated
        yield number, step, held
        with span(f"{direction}/step{number}/wait"):
            pending.wait()
        held = arriving


def _post_gradients(
    exchange: Exchange, rank: int, previous: Step | None, leaving: torch.Tensor | None, step: Step | None
) -> tuple[list[tuple[Transfer, torch.Tensor]], list[tuple[Transfer, torch.Tensor]], Pending]:
    """Send the gradient sums `leaving` of the step before, and receive others.

    Returns:
        The sums to add to those of this step, the sums of this rank's own keys that return, and the messages.
    """
    if previous is None or leaving is None:
        return [], [], Pending()

    def expect(transfers: tuple[Transfer, ...], like: torch.Tensor = leaving) -> list[tuple[Transfer, torch.Tensor]]:
        return [(transfer, like.new_empty(transfer.stop - transfer.start, *like.shape[1:])) for transfer in transfers]

    joined, returned = expect(step.grad_receives if step else ()), expect(previous.grad_returns)
    receives = [(transfer.peer, part) for transfer, part in joined + returned]
    pending = _post(exchange, rank, _messages(previous.grad_sends, leaving), receives)
    return joined, returned, pending


def _add(sums: torch.Tensor | None, parts: list[tuple[Transfer, torch.Tensor]]) -> None:
    """Add the parts that have arrived to their rows of `sums`, which may be None if there are no parts."""
    for transfer, part in parts:
        assert sums is not None
        sums[transfer.start : transfer.stop] += part


def _post(exchange: Exchange, rank: int, sends: list[Message], receives: list[Message]) -> Pending:
    """Post messages to other ranks, and copy the messages of `rank` to itself."""
    pending = exchange.post(*([m for m in messages if m[0] != rank] for messages in (sends, receives)))
    mine = ([tensor for peer, tensor in messages if peer == rank] for messages in (sends, receives))
    for source, target in zip(*mine):
        target.copy_(source)
    return pending


def _messages(transfers: tuple[Transfer, ...], buffer: torch.Tensor) -> list[Message]:
    """Messages of the ranges of `buffer`. They are contiguous views, since tokens are its first dimension."""
    return [(transfer.peer, buffer[transfer.start : transfer.stop]) for transfer in transfers]


class _Sum:
    """Sum of parts, in the shape of a tensor and in `dtype`. Rows without a part are 0."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype):
        self._shape, self._dtype, self._device = like.shape, dtype, like.device
        self._total: torch.Tensor | None = None

    def add(self, runs: tuple[Interval, ...], part: torch.Tensor) -> None:
        """Add `part`, which holds the rows `runs` one after another."""
        if self._total is None and runs == ((0, self._shape[0]),):
            self._total = part.to(self._dtype)  # a part with all rows, as in each step of one document
            return
        total, offset = self.total(), 0
        for start, stop in runs:
            total[start:stop] += part[offset : offset + stop - start]
            offset += stop - start

    def total(self) -> torch.Tensor:
        if self._total is None:
            self._total = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        return self._total
