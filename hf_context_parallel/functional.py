"""Attention over sequences that a CP group holds, for custom models. See `ContextParallel.attention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .config import check_comm_type
from .cp_group import CPGroup
from .distributed.agreement import collective
from .integration.active_batch import active_batch
from .planning import mask as masks
from .planning.balanced import make_layout
from .planning.layout import Layout
from .planning.mask import layer_type


@torch.compiler.disable  # compiled code calls it as it is: ranks talk to each other
def attention(
    group: CPGroup,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: masks.Pattern,
    softcap: float | None,
    sinks: torch.Tensor | None,
    scale: float | None,
    cu_seqlens: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    dropout_p: float,
    deterministic: bool,
    comm_type: str | None,
) -> torch.Tensor:
    """Compute attention of this rank's queries to the keys of the group.

    Other arguments are those of `ContextParallel.attention`.

    Args:
        pattern: causal or not, window and chunk size.

    Returns:
        `[B, H, S_local, D_v]`; 0 for tokens that read no key.

    Raises:
        ValueError: on all ranks, before any key travels, if lengths, heads, dtypes or options do not fit.
    """
    settings = {"cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
    with collective(group.groups, "arguments", "Call cp.attention with the same ones on all ranks.") as notes:
        notes.alarm = group.exchange.interrupted
        if cu_seqlens is None and attention_mask is None:
            _refuse_documents_unsaid(group)
        _check_heads(q, k, v, sinks)
        call = group.prepare(q, k, v, scale=scale, softcap=softcap, dropout_p=dropout_p, deterministic=deterministic)
        notes.number = q.shape[2]
        shapes = [(*x.shape[:2], x.shape[3], x.dtype) for x in call[:3]]
        if comm_type is None:
            comm_type = group.config.comm_type_of(layer_type(pattern), None)
        else:
            check_comm_type(comm_type)
        options = shapes, pattern, call.scores._replace(seed=0), sinks is None, comm_type
        notes.compare({"shapes, mask and options": options, **settings})
    if notes.alarm:
        group.exchange.settle(group.groups)
    # From here on all ranks have the same data, so they all refuse or none does.
    layout, mask = _whole(group, q.shape[0], notes.numbers, pattern, cu_seqlens, attention_mask)
    strategy = group.strategy(comm_type, layout, mask, call.shape, q.device)
    return group.attend(call, strategy, sinks).transpose(1, 2)


def layout_of(group: CPGroup, length: int, documents: Sequence[masks.Document]) -> Layout:
    """Layout of a sequence of `length` tokens: that of the active batch, if it has this length.

    Elsewhere `"auto"` is zigzag, which depends on the length alone. With a layout that depends on documents, tokens
    that were dealt without them would be taken for others.
    """
    batch = active_batch()
    if batch is not None and batch.group is group and batch.shard.layout.length == length:
        return batch.shard.layout
    name = group.config.layout
    return make_layout("zigzag" if name == "auto" else name, length, group.size, documents)


def _whole(
    group: CPGroup,
    batch_size: int,
    lengths: list[int],
    pattern: masks.Pattern,
    cu_seqlens: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> tuple[Layout, masks.Mask]:
    """Make the layout and the mask of one call of `attention`, for ranks that hold `lengths` tokens."""
    documents = () if cu_seqlens is None else masks.from_cu_seqlens(cu_seqlens, sum(lengths))
    layout = layout_of(group, sum(lengths), documents)
    expected = [layout.local_length(rank) for rank in range(group.size)]
    if lengths != expected:
        raise ValueError(
            f"the queries of the ranks have {lengths} tokens, but the layout {group.config.layout!r} of a sequence "
            f"of {layout.length} tokens deals them {expected}. Give each rank the tokens that "
            f"cp.positions({layout.length}, cu_seqlens) lists."
        )
    if cu_seqlens is not None and attention_mask is not None:
        raise ValueError(
            "cu_seqlens and attention_mask exclude each other. Give cu_seqlens alone, with padding as a document."
        )
    if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, layout.length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the whole batch has "
            f"{(batch_size, layout.length)}. Give the mask of the whole sequence."
        )
    if attention_mask is not None:
        rows = masks.from_attention_mask(attention_mask)
    elif cu_seqlens is not None:
        rows = (documents,) * batch_size
    else:
        rows = masks.whole_rows(batch_size, layout.length)
    return layout, masks.Mask(layout.length, rows, pattern)


def _refuse_documents_unsaid(group: CPGroup) -> None:
    """Refuse attention without documents while a batch that has several documents or padding is open."""
    batch = active_batch()
    if batch is None or batch.group is not group:
        return
    shard = batch.shard
    if shard.packed or shard.padding is not None or shard.layout.length != shard.length:
        raise ValueError(
            "cp.attention() ignores the active batch, which has several documents or padding (its rows of "
            f"{shard.length} tokens are padded to {shard.layout.length}). Give cu_seqlens or attention_mask of the "
            "whole row, or call cp.attention() outside of cp.shard."
        )


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """Refuse tensors whose shapes do not fit together."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} is of type {type(tensor).__name__}. Give a tensor.")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k and v have shapes {shapes}. Give tensors [B, H, S_local, D].")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[2] == k.shape[2] == v.shape[2]):
        raise ValueError(f"q, k and v differ in rows or tokens: {shapes}. Give all three the same.")
    if not k.shape[1] == v.shape[1] > 0 or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"the heads of q, k and v do not fit together: {shapes}. Give k and v equally many heads, a divisor of "
            "q's number of heads, and give q and k the same head dim."
        )
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}. Give one score for each of q's {q.shape[1]} heads.")
