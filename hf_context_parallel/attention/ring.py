"""A plan executed: keys and values travel from rank to rank while attention is computed with those already here.

The ring is that of Liu et al., "Ring Attention with Blockwise Transformers" (2023, arXiv:2310.01889), with the
transfers cut to what the plan says is read. A plan in which all keys arrive in one step is executed alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    guard: Callable[[], None] = lambda: None,
    shared: SharedHeads | None = None,
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of all ranks that the plan says they read.

    Args:
        query: `[T, H, D]`, this rank's tokens, numbered as in the plan.
        key, value: `[T, H_kv, D]` and `[T, H_kv, D_v]`, of the same dtype. H_kv divides H.
        scores: how scores are made. Their seed differs between ranks.
        sinks: `[H]`, a score a head beside those of the keys, whose value is 0 (learnable, `s_aux`).
        guard: called before backward; raises if the batch is no longer the one being computed.
        shared: the exchange that gives this rank some heads of more tokens, which are then the plan's.

    Returns:
        `[T, H, D_v]` in the dtype of `query`; 0 for tokens that the plan computes nothing for.
    """
    key_value = torch.cat([key, value], dim=-1)  # one message a transfer instead of two
    arguments = key.shape[-1], plan, exchange, kernel, scores, guard, shared
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
        guard: Callable[[], None],
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
        # Backward may run in a thread of autograd's own, so it looks nothing up: all it needs is here.
        ctx.environment = (key_dim, plan, exchange, kernel, scores)
        ctx.guard, ctx.shared, ctx.heads = guard, shared, heads
        if shared is None:
            return output
        with span("forward/to tokens"):
            return shared.output_to_tokens(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.guard()  # before the saved tensors, whose recomputation under gradient checkpointing would communicate
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
    """The output `[T, H, D_v]` and its LSE `[T, H]`, in the dtype that sums are kept in."""
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
        del keys  # or it would be a fourth buffer while the next step's is allocated
    if output is None or lse is None:  # nothing but padding
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
    """The gradients of the query `[T, H, D]`, in its dtype, and of this rank's keys and values `[T, H_kv, D + D_v]`,
    in the dtype that sums are kept in."""
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
            joining, homecoming, pending = _post_gradients(exchange, plan.rank, previous, leaving, step)
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
                _add(leaving, joining)
                _add(grad_own, homecoming)
        stream.keep(sent)
        grad_own = leaving if grad_own is None else grad_own
        previous = step
        del joining, homecoming, sent  # or they would be alive while the next ones are allocated
    stream.join()
    assert grad_own is not None  # a plan has a step
    return grad_query.total().to(query.dtype), grad_own


def _exchanged(
    direction: str, plan: Plan, exchange: Exchange, own: torch.Tensor
) -> Iterator[tuple[int, Step, torch.Tensor]]:
    """Each step by its number, with its keys. The next step's are on their way while the caller computes with these.

    Three buffers are alive at most: this rank's own keys, those of this step, and those that arrive. (`enumerate` of
    this would keep a fourth: it lets go of an item when it has the next.)
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
            del sends  # or they would keep the keys of this step while the step after next's are allocated
        yield number, step, held
        with span(f"{direction}/step{number}/wait"):
            pending.wait()
        held = arriving


def _post_gradients(
    exchange: Exchange, rank: int, previous: Step | None, leaving: torch.Tensor | None, step: Step | None
) -> tuple[list[tuple[Transfer, torch.Tensor]], list[tuple[Transfer, torch.Tensor]], Pending]:
    """Hand on the sums `leaving` of the step before, and receive what joins this step's and what comes home."""
    if previous is None or leaving is None:
        return [], [], Pending()

    def expect(transfers: tuple[Transfer, ...], like: torch.Tensor = leaving) -> list[tuple[Transfer, torch.Tensor]]:
        return [(transfer, like.new_empty(transfer.stop - transfer.start, *like.shape[1:])) for transfer in transfers]

    joining, homecoming = expect(step.grad_receives if step else ()), expect(previous.grad_returns)
    receives = [(transfer.peer, part) for transfer, part in joining + homecoming]
    pending = _post(exchange, rank, _messages(previous.grad_sends, leaving), receives)
    return joining, homecoming, pending


def _add(sums: torch.Tensor | None, parts: list[tuple[Transfer, torch.Tensor]]) -> None:
    """Add what has arrived to the rows that it is of. Where nothing has, there may be no sums yet."""
    for transfer, part in parts:
        assert sums is not None
        sums[transfer.start : transfer.stop] += part


def _post(exchange: Exchange, rank: int, sends: list[Message], receives: list[Message]) -> Pending:
    """Post messages, and copy what `rank` has for itself meanwhile."""
    pending = exchange.post(*([m for m in messages if m[0] != rank] for messages in (sends, receives)))
    mine = ([tensor for peer, tensor in messages if peer == rank] for messages in (sends, receives))
    for source, target in zip(*mine):
        target.copy_(source)
    return pending


def _messages(transfers: tuple[Transfer, ...], buffer: torch.Tensor) -> list[Message]:
    """The transfers' ranges of `buffer`: contiguous views, since tokens are its first dimension."""
    return [(transfer.peer, buffer[transfer.start : transfer.stop]) for transfer in transfers]


class _Sum:
    """Rows like those of a tensor, in `dtype`, that parts are added to: 0 where nothing was."""

    def __init__(self, like: torch.Tensor, dtype: torch.dtype):
        self._shape, self._dtype, self._device = like.shape, dtype, like.device
        self._total: torch.Tensor | None = None

    def add(self, runs: tuple[Interval, ...], part: torch.Tensor) -> None:
        """Add the rows of `part`, which are those of `runs` one after another."""
        if self._total is None and runs == ((0, self._shape[0]),):
            self._total = part.to(self._dtype)  # all rows at once, as in every step of one document
            return
        total, offset = self.total(), 0
        for start, stop in runs:
            total[start:stop] += part[offset : offset + stop - start]
            offset += stop - start

    def total(self) -> torch.Tensor:
        if self._total is None:
            self._total = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        return self._total
