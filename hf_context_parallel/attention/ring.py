"""Execution of a plan: keys/values travel between ranks while attention is computed with those that have arrived.

The ring is that of Liu et al., "Ring Attention with Blockwise Transformers" (2023, arXiv:2310.01889). It transfers
only the keys that are read, as listed in the plan. A plan in which all keys arrive in one step is executed by the same
code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..distributed.buffers import keeping, new_buffer
from ..distributed.messages import Exchange, Message, Pending, accumulation_dtype, in_flight, new_message
from ..distributed.rows import Rows
from ..distributed.side_stream import GradientStream
from ..planning.plan import Plan
from .heads import heads_of, with_heads
from .kernels.base import Kernel
from .prepared import PreparedPlan, PreparedStep, SumMessages, prepared
from .profiling import span
from .scores import Scores
from .sinks import add_sinks, sinks_gradient
from .tape import Record, active_pass
from .totals import Output, Sum
from .ulysses import SharedHeads


class Means(NamedTuple):
    """Arguments of `planned_attention` by which tensors are computed, with the plan made ready."""

    plan: PreparedPlan
    exchange: Exchange
    kernel: Kernel
    scores: Scores


class HeadGroup(NamedTuple):
    """Heads of a layer that are computed together.

    Args:
        heads, key_heads: query heads, and the key heads that they read.
        shared: exchange of these heads in a subgroup, or None.
    """

    heads: range
    key_heads: range
    shared: SharedHeads | None = None

    @property
    def computed(self) -> range:
        """Query heads that this rank computes."""
        return self.heads if self.shared is None else self.heads[self.shared.mine.start : self.shared.mine.stop]


def planned_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    plan: Plan,
    exchange: Exchange,
    kernel: Kernel,
    scores: Scores,
    groups: Sequence[HeadGroup],
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention of this rank's queries to the keys that the plan lists, on all ranks.

    Args:
        query: `[T, H, D]`, the tokens of this rank, numbered as in the plan.
        key, value: `[T, H_kv, D]` and `[T, H_kv, D_v]`, of the same dtype. H_kv divides H.
        scores: rule for scores. Its seed differs between ranks.
        groups: all heads of the layer, in the groups that are computed one after another. They are the same on all
            ranks. If heads are exchanged in a subgroup, the plan numbers the tokens of the subgroup that travel.
        sinks: `[H]`, one more score for each head, with a value of 0 (learnable, `s_aux`).

    Returns:
        `[T, H, D_v]` in the dtype of `query`; 0 for tokens that are in no call of the plan.
    """
    means = Means(prepared(plan), exchange, kernel, scores)
    record, checkpointed = None, active_pass()
    if checkpointed is not None:
        described = query.device.type, query.dtype, *(tuple(x.shape) for x in (query, key, value)), len(groups)
        record = checkpointed.next((*described, sinks is None, scores._replace(seed=0)), means)
        means = record.means  # with the seed of the first pass
    output: torch.Tensor = _Attention.apply(query, key, value, sinks, means, tuple(groups), record)
    return output


class _Attention(torch.autograd.Function):
    """Attention with gradients, one group of heads after another.

    If heads are exchanged, backward needs queries, keys/values and output of the heads of this rank, which are saved.
    With a record, those of the tokens of this rank are saved, since a replay exchanges nothing. They are exchanged in
    backward, in the messages that carry the gradient of the output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        means: Means,
        groups: tuple[HeadGroup, ...],
        record: Record | None,
    ) -> torch.Tensor:
        # Backward may run in a thread of autograd, where the active batch cannot be looked up. So it is all kept here.
        ctx.means, ctx.groups, ctx.key_dim = means, groups, key.shape[-1]
        exchanges = groups[0].shared is not None
        ctx.exchanges_again = exchanges and record is not None
        with _without_autocast(query), keeping(means.plan.keeps_buffers):
            query = query.contiguous()
            sending = means.exchange if means.plan.travels and not exchanges else None
            inputs = [
                (heads_of(query, heads), _packed(heads_of(key, keys), heads_of(value, keys), sending))
                for heads, keys, _ in groups
            ]
            exchanged: list[_Computed] = []
            if record is not None and record.is_kept:
                result, lse = record.kept()
                lses = list(lse.split_with_sizes([len(group.computed) for group in groups], 1))
            else:
                keeps = exchanges and record is None
                result, lses, exchanged = _forward_of_groups(inputs, sinks, ctx.key_dim, means, groups, keeps)
                if record is not None:
                    record.keep(result, lses[0] if len(groups) == 1 else torch.cat(lses, 1))
        saved = exchanged or [
            _Computed(*given, heads_of(result, group.heads), lse) for given, lse, group in zip(inputs, lses, groups)
        ]
        ctx.save_for_backward(sinks, *(tensor for tensors in saved for tensor in tensors))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sinks, *saved = ctx.saved_tensors
        grad_query: torch.Tensor | None = None
        grad_key_value: torch.Tensor | None = None
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        heads, key_heads = ctx.groups[-1].heads.stop, ctx.groups[-1].key_heads.stop
        with _without_autocast(grad_output), keeping(ctx.means.plan.keeps_buffers):
            grad_output = grad_output.contiguous()
            for number, group in enumerate(ctx.groups):
                of_rows, of_keys = _backward_of_group(
                    heads_of(grad_output, group.heads),
                    _Computed(*saved[4 * number : 4 * number + 4]),
                    sinks,
                    grad_sinks,
                    ctx.key_dim,
                    _means_of_group(ctx.means, number, ctx.groups),
                    group,
                    ctx.exchanges_again,
                )
                grad_query = with_heads(grad_query, of_rows, group.heads, heads)
                grad_key_value = with_heads(grad_key_value, of_keys, group.key_heads, key_heads)
                del of_rows, of_keys
        assert grad_key_value is not None  # there is at least one group
        return grad_query, *_split(grad_key_value, ctx.key_dim), grad_sinks, None, None, None


class _Computed(NamedTuple):
    """Tensors of a group that backward needs: its queries and keys/values, its output and its LSE."""

    query: torch.Tensor
    key_value: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor


def _means_of_group(means: Means, number: int, groups: Sequence[HeadGroup]) -> Means:
    """Means of a group of heads, which has a seed of its own."""
    return means if len(groups) == 1 else means._replace(scores=means.scores.of("heads", number))


def _forward_of_groups(
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    sinks: torch.Tensor | None,
    key_dim: int,
    means: Means,
    groups: Sequence[HeadGroup],
    keeps: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], list[_Computed]]:
    """Compute the output of all heads.

    Args:
        inputs: queries and keys/values of each group.
        keeps: True to return what was computed after heads were exchanged.

    Returns:
        The output `[T, H, D_v]`; for each group the LSE of the heads of this rank; and what was asked for.
    """
    result: torch.Tensor | None = None
    lses, exchanged = [], []
    for number, (group, (query, key_value)) in enumerate(zip(groups, inputs)):
        dtype, shared = query.dtype, group.shared
        if shared is not None:
            with span("forward", "to heads"):
                query, key_value = shared.to_heads(query, key_value)
        output, lse = _forward(query, key_value, key_dim, *_means_of_group(means, number, groups))
        if sinks is not None:
            lse = add_sinks(output, lse, _of(sinks, group.computed))
        part = output = _as(output, dtype)
        if shared is None:
            part = output.contiguous()  # as models take it, which else would copy what is saved
        else:
            with span("forward", "to tokens"):
                part = shared.output_to_tokens(output)
        result = with_heads(result, part, group.heads, groups[-1].heads.stop)
        lses.append(lse)
        if keeps:
            exchanged.append(_Computed(query, key_value, output, lse))
        del query, key_value, output, part  # before those of the next group are made
    assert result is not None  # there is at least one group
    return result, lses, exchanged


def _backward_of_group(
    grad_output: torch.Tensor,
    computed: _Computed,
    sinks: torch.Tensor | None,
    grad_sinks: torch.Tensor | None,
    key_dim: int,
    means: Means,
    group: HeadGroup,
    exchanges_again: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of a group's queries and keys/values, and write those of the sinks of this rank's heads.

    Args:
        exchanges_again: True if queries, keys/values and output are those of the tokens of this rank, and heads are
            exchanged.
    """
    (query, key_value, output, lse), shared, dtype = computed, group.shared, computed.key_value.dtype
    if shared is not None:
        with span("backward", "to heads"):
            if exchanges_again:
                grad_output, output, query, key_value = shared.all_to_heads(grad_output, output, query, key_value)
            else:
                grad_output = shared.output_to_heads(grad_output)
    grad_query, grad_key_value = _backward(grad_output, query, key_value, output, lse, key_dim, *means)
    if sinks is not None and grad_sinks is not None:
        _of(grad_sinks, group.computed).copy_(sinks_gradient(grad_output, output, lse, _of(sinks, group.computed)))
    if shared is not None:
        del grad_output, output, query, key_value  # those of this rank's heads
        grad_key_value = _as(grad_key_value, shared.gradient_dtype(dtype, grad_key_value.dtype))
        with span("backward", "to tokens"):
            grad_query, grad_key_value = shared.to_tokens(grad_query, grad_key_value)
    return grad_query, _as(grad_key_value, dtype)


def _of(sinks: torch.Tensor, heads: range) -> torch.Tensor:
    return sinks[heads.start : heads.stop]


def _without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """Context without autocast on the device of `x`. It takes no time where autocast is off."""
    name = x.device.type
    return torch.autocast(name, enabled=False) if torch.is_autocast_enabled(name) else nullcontext()


def _as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _packed(key: torch.Tensor, value: torch.Tensor, exchange: Exchange | None) -> torch.Tensor:
    """Join keys and values, `[T, H_kv, D + D_v]`, in memory for messages unless the exchange is None."""
    if exchange is None:
        return torch.cat([key, value], dim=-1)
    packed = new_message(exchange, key, *key.shape[:2], key.shape[2] + value.shape[2])
    torch.cat([key, value], dim=-1, out=packed)
    return packed


def _forward(
    query: torch.Tensor,
    key_value: torch.Tensor,
    key_dim: int,
    plan: PreparedPlan,
    exchange: Exchange,
    kernel: Kernel,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the output `[T, H, D_v]`, and its LSE `[T, H]` in the accumulation dtype."""
    output, count = Output(plan.queries), 0
    with in_flight(exchange) as exchange:
        for step, keys in _exchanged("forward", plan, exchange, key_value):
            number = step.number
            for index, call in enumerate(step.calls):
                with span("forward", "compute", number):
                    key, value = _split(keys, key_dim)
                    part = kernel.forward(query, key, value, call, scores.of(number, index))
                with span("forward", "merge", number):
                    output.add(count, *part)
                count += 1
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
    plan: PreparedPlan,
    exchange: Exchange,
    kernel: Kernel,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of the query and of this rank's keys/values.

    Returns:
        `[T, H, D]` in the dtype of the query, and `[T, H_kv, D + D_v]` in the accumulation dtype if they are sums.
    """
    grad_query, sums, count = Sum(plan.queries), _TravellingSums(plan, query.device), 0
    with in_flight(exchange) as exchange:
        for step, keys in _exchanged("backward", plan, exchange, key_value):
            number = step.number
            sums.post(exchange, number)
            if number and not step.tokens:
                sums.follow(step, None)
                continue
            grad_keys = _KeySums(step, key_value, key_dim, plan.travels, exchange)
            for index, call in enumerate(step.calls):
                key, value = _split(keys, key_dim)
                arguments = grad_output, query, key, value, output, lse, call, scores.of(number, index)
                with span("backward", "compute", number):
                    dq, dk, dv = kernel.backward(*arguments)
                with span("backward", "merge", number):
                    grad_query.add(count, dq)
                    grad_keys.add(index, dk, dv)
                count += 1
                del arguments, key, value, dq, dk, dv
            total = grad_keys.total()
            del keys, grad_keys
            sums.follow(step, total)
            del total
        sums.post(exchange, number + 1)
        sums.follow(None, None)
    of_query = torch.zeros_like(query) if grad_query.value is None else _as(grad_query.value, query.dtype)
    return of_query, sums.own()


class _TravellingSums:
    """Sums of gradients of keys/values, which follow the keys one step behind.

    At each step the sums of the step before are posted, and waited for when the gradients of the step are computed.
    """

    def __init__(self, plan: PreparedPlan, device: torch.device):
        self._plan = plan
        self._stream = GradientStream(device)
        self._leaving: torch.Tensor | None = None
        """Sums of the step before, if it had keys."""
        self._messages: SumMessages | None = None
        """Messages that carry them, and others of that time."""
        self._own: torch.Tensor | None = None
        """Sums of this rank's own keys."""
        self._number = 0
        self._arriving: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Pending] | None = None

    def post(self, exchange: Exchange, number: int) -> None:
        """Send the sums of the step before, and receive others."""
        messages, own = self._messages, self._own
        if messages is None or own is None:
            return
        self._number = number
        with self._stream, span("backward", "send sums", number):
            joined, returned = messages.joined.apart(exchange, own), messages.returned.apart(exchange, own)
            receives = [*zip(messages.joined.peers, joined), *zip(messages.returned.peers, returned)]
            sends = [] if self._leaving is None else messages.sends.taken(self._leaving)
            pending = _post(exchange, self._plan, sends, receives)
        self._arriving = joined, returned, pending

    def follow(self, step: PreparedStep | None, sums: torch.Tensor | None) -> None:
        """Wait for the messages, and add those that have arrived to the sums of a step or of this rank's own keys."""
        messages, self._messages = self._messages, None if step is None else step.sums
        sent, self._leaving = self._leaving, sums
        self._stream.follow()
        if messages is not None and self._arriving is not None:
            joined, returned, pending = self._arriving
            self._arriving = None
            with self._stream:
                with span("backward", "wait sums", self._number):
                    pending.wait()
                with span("backward", "add sums", self._number):
                    _add(sums, messages.joined.rows, joined)
                    _add(self._own, messages.returned.rows, returned)
        self._stream.keep(sent)
        if self._own is None:
            self._own = sums

    def own(self) -> torch.Tensor:
        """Sums of this rank's own keys, once all steps are done."""
        self._stream.join()
        assert self._own is not None  # a plan has at least one step
        return self._own


def _exchanged(
    direction: str, plan: PreparedPlan, exchange: Exchange, own: torch.Tensor
) -> Iterator[tuple[PreparedStep, torch.Tensor]]:
    """Yield each step with its keys. The next keys travel while the caller computes with these.

    At most three buffers are alive: this rank's own keys, the keys of this step, and the keys that arrive. If messages
    hold scattered rows, these land in a fourth one. Around this generator `enumerate` would keep one more, since it
    frees an item only when it has the next one.
    """
    held = own
    for step, upcoming in plan.steps:
        if upcoming is None:
            yield step, held
            return
        if upcoming.is_empty:
            yield step, held
            held = own  # of which nothing is read
            continue
        number = step.number
        with span(direction, "send", number):
            arriving, landings, apart = upcoming.receives.landings(exchange, own, upcoming.tokens)
            sends = upcoming.forwards.taken(held) + upcoming.direct_sends.taken(own)
            pending = _post(exchange, plan, sends, landings)
            del sends, landings  # else they would keep keys alive when buffers of later steps are allocated
        yield step, held
        with span(direction, "wait", number):
            pending.wait()
        if apart is not None:
            with span(direction, "order", number):
                upcoming.receives.settle(apart, arriving)
        held = arriving
        del apart, arriving


def _split(keys: torch.Tensor, key_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the keys and of the values in packed keys/values."""
    key, value = keys.split_with_sizes((key_dim, keys.shape[-1] - key_dim), -1)
    return key, value


def _add(sums: torch.Tensor | None, places: Sequence[Rows], parts: Sequence[torch.Tensor]) -> None:
    """Add the parts that have arrived to their rows of `sums`, which may be None if there are no parts."""
    for rows, part in zip(places, parts):
        assert sums is not None
        Rows.move(part, None, sums, rows, add=True)


def _post(exchange: Exchange, plan: PreparedPlan, sends: list[Message], receives: list[Message]) -> Pending:
    """Post messages to other ranks, and copy the messages of this rank to itself."""
    if not (sends or receives):
        return Pending()
    if not plan.sends_itself:
        return exchange.post(sends, receives)
    rank = plan.rank
    pending = exchange.post(*([m for m in messages if m[0] != rank] for messages in (sends, receives)))
    mine = ([tensor for peer, tensor in messages if peer == rank] for messages in (sends, receives))
    for source, target in zip(*mine):
        target.copy_(source)
    return pending


class _KeySums:
    """Sums of the gradients of a step's keys/values, `[tokens, H_kv, D + D_v]`.

    They are in the accumulation dtype. If each row is of one call and nothing travels, they are in the dtype of the
    call.

    Args:
        like: keys/values of any step.
        travels: True if keys of any step travel.
        exchange: the exchange that sends the sums of steps whose keys are those of other ranks.
    """

    def __init__(self, step: PreparedStep, like: torch.Tensor, key_dim: int, travels: bool, exchange: Exchange):
        self._places, self._tokens, self._like, self._key_dim = step.keys, step.tokens, like, key_dim
        self._adds = travels or step.keys.most > 1
        self._exchange = exchange if step.sums is not None and step.sums.sends.peers else None
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
        shape = self._tokens, *self._like.shape[1:]
        if self._exchange is None:
            total = new_buffer(self._like, *shape, dtype=dtype)
        else:
            total = new_message(self._exchange, self._like, *shape, dtype=dtype)
        return total if self._places.complete else total.zero_()
