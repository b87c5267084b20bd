"""Attention in a compiled model: one operator, which `torch.compile` calls and does not look into.

Ranks wait for each other in it, and what they send depends on the documents of a batch, so it cannot be traced. As an
operator it does not break the graph: a decoder is compiled as a whole.

An operator takes and returns tensors and numbers. Backward runs after the batch was left. With checkpointing, it runs
the layers again. So the operator cannot look up the active batch. The batch, and what backward needs, are held under
the number of a *ticket*, a tensor that the compiled graph keeps like any other. What a ticket stands for is dropped
with it: after backward, when the graph is freed, or when checkpointing drops what it is going to compute again.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from ...attention.executor import one_dtype
from ...compat import recording_gradients
from ...planning.mask import Pattern
from ..active_batch import ActiveBatch
from .planned_mask import PlannedMask
from .sharded_attention import sharded_attention

Held = TypeVar("Held")
TAGS = (torch.Tag.cudagraph_unsafe,)
"""A CUDA graph would send the messages of the batch that it was recorded with, for every batch."""


class Tickets(Generic[Held]):
    """Objects that are held as long as their tickets."""

    def __init__(self) -> None:
        self._held: dict[int, Held] = {}
        self._numbers = itertools.count(1)

    def issue(self, held: Held) -> torch.Tensor:
        """Hold an object, and return its ticket, `[]`."""
        ticket = torch.tensor(next(self._numbers), device="cpu")
        self._held[int(ticket)] = held
        # Not with the tensor: the compiled graph makes other tensors of the same memory.
        weakref.finalize(ticket.untyped_storage(), self._held.pop, int(ticket), None)
        return ticket

    def find(self, ticket: torch.Tensor) -> Held | None:
        """Return the object of a ticket, or None if it is not held any more."""
        return self._held.get(int(ticket))

    def __len__(self) -> int:
        return len(self._held)


class Call(NamedTuple):
    """Inputs and output of a call, joined by the graph of autograd."""

    inputs: list[torch.Tensor]
    output: torch.Tensor


batches: Tickets[ActiveBatch] = Tickets()
calls: Tickets[Call] = Tickets()
"""Calls that wait for their backward."""


def of_batch(mask: PlannedMask, batch: ActiveBatch) -> PlannedMask:
    """Tell a mask what the operator has to know of the batch."""
    mask.batch, mask.by_layer = batches.issue(batch), isinstance(batch.group.config.comm_type, tuple)
    rows, length = batch.local_shape
    mask.shape = rows, 1, length, length
    if batch.patterns.setdefault(mask.rule, mask.pattern) != mask.pattern:
        batch.patterns[mask.rule] = None
    return mask


def attention_in_graph(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PlannedMask,
    rule: Pattern,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Call the operator while a model is traced: `[B, S, H, D_v]`.

    Args:
        rule: the keys that a token reads, without blocks.
        sinks: `[H]`, or None.

    The other arguments are those of `context_parallel_attention`.
    """
    query, key, value = one_dtype(query, key, value)  # when the operator runs, autocast is off
    tensors = query, key, value, sinks
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    layer = type(module).__name__, getattr(module, "layer_idx", None) if mask.by_layer else None
    output: torch.Tensor = _attention(*tensors, mask.batch, *rule[:3], scaling, softcap, *layer, trains)[0]
    return output


@torch.library.custom_op("hf_context_parallel::attention", mutates_args=(), tags=TAGS)
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    ticket: torch.Tensor,
    causal: bool,
    sliding_window: int | None,
    chunk_size: int | None,
    scaling: float | None,
    softcap: float | None,
    layer: str,
    index: int | None,
    trains: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of a layer of a batch, `[B, S, H, D_v]`, and the ticket of its backward."""
    batch = batches.find(ticket)
    assert batch is not None  # it is held as long as the ticket
    pattern = batch.patterns[Pattern(causal, sliding_window, chunk_size)]
    if pattern is None:
        raise ValueError(
            f"{layer} is compiled, and its model has masks that differ in their blocks of tokens alone, which "
            "compiled code cannot tell apart. Do not compile the model."
        )
    rule = pattern, scaling, softcap
    if not trains:
        return sharded_attention(batch, layer, index, query, key, value, sinks, *rule), torch.tensor(0, device="cpu")
    # Compiled code writes over tensors that it does not need any more. It does not know that these are kept.
    copies = [None if x is None else x.clone().requires_grad_() for x in (query, key, value, sinks)]
    with recording_gradients():
        output = sharded_attention(batch, layer, index, *copies, *rule)  # type: ignore[arg-type]
    return output.detach().clone(), calls.issue(Call([x for x in copies if x is not None], output))


@_attention.register_fake
def _shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, length, _ = query.shape
    return query.new_empty(rows, length, heads, value.shape[-1]), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("hf_context_parallel::attention_backward", mutates_args=(), tags=TAGS)
def _backward(
    grad_output: torch.Tensor, ticket: torch.Tensor, shapes: list[int], sinks: torch.dtype | None
) -> list[torch.Tensor]:
    """Compute the gradients of the inputs of a call.

    Args:
        shapes: the shapes of query, key and value, one after another.
        sinks: the dtype of the sinks, or None if the layer has none.

    Raises:
        RuntimeError: if hooks on saved tensors have copied the ticket.
    """
    call = calls.find(ticket)
    if call is None:
        raise RuntimeError(
            "what backward of a compiled layer needs is gone: hooks on saved tensors have copied all of them, as "
            "save_on_cpu(pin_memory=True) does. Leave these hooks out, or do not compile the model."
        )
    gradients = torch.autograd.grad(call.output, call.inputs, grad_output, retain_graph=True)
    return [gradient.contiguous() for gradient in gradients]


@_backward.register_fake
def _shapes_of_gradients(
    grad_output: torch.Tensor, ticket: torch.Tensor, shapes: list[int], sinks: torch.dtype | None
) -> list[torch.Tensor]:
    gradients = [grad_output.new_empty(shapes[start : start + 4]) for start in (0, 4, 8)]
    return gradients if sinks is None else [*gradients, grad_output.new_empty(shapes[1], dtype=sinks)]


def _keep_ticket(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, sinks, *_ = inputs
    ctx.save_for_backward(output[1])
    ctx.shapes, ctx.sinks = [*query.shape, *key.shape, *value.shape], None if sinks is None else sinks.dtype


def _gradients(ctx: Any, grad_output: torch.Tensor, _: torch.Tensor) -> tuple:
    gradients = _backward(grad_output, *ctx.saved_tensors, ctx.shapes, ctx.sinks)
    return *gradients[:3], None if ctx.sinks is None else gradients[3], *[None] * 9


_attention.register_autograd(_gradients, setup_context=_keep_ticket)
