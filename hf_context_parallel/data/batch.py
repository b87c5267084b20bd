"""Reading a whole batch: its documents, its targets, and the refusal of what cannot be sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from ..planning import mask as masks

IGNORED = -100
"""The label that the loss leaves out."""
SHARD = "context_parallel_shard"
"""The key under which a sharded batch carries its `Shard`."""
PADDING = {
    "input_ids": 0,
    "inputs_embeds": 0,
    "token_type_ids": 0,
    "position_ids": 0,
    "labels": IGNORED,
    "shift_labels": IGNORED,
}
"""The inputs with a sequence dimension (their second), and what fills them up."""
CONSUMED = ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""The inputs that say what the documents are. The plan says it from there on."""
PASSED_ON = ("num_items_in_batch", "return_dict", "output_hidden_states")
"""The inputs that mean on a shard what they mean on the whole."""


def read_batch(batch: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[tuple[masks.Document, ...], ...], dict]:
    """A whole batch as the inputs that it has, the documents of each row, and its inputs with a sequence dimension.

    Those are `[B, S]`, with the `position_ids` and the `shift_labels` that one process would make, and `labels` (if
    there are any) the same.

    Raises:
        ValueError: as `shard_batch` does.
    """
    batch = {name: value for name, value in batch.items() if value is not None}
    if "input_ids" not in batch and "inputs_embeds" not in batch:
        raise ValueError(f"the batch has neither input_ids nor inputs_embeds, only {sorted(batch)}: give one of them.")
    _refuse_unknown(batch)
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    batch_size, length = tokens.shape[:2]
    _check_shapes(batch, batch_size, length)
    rows = _documents(batch, batch_size, length)

    whole = {name: batch[name] for name in PADDING if name in batch}
    if "position_ids" not in whole:
        whole["position_ids"] = (
            positions_in_documents(rows, length) if "cu_seq_lens_q" in batch else torch.arange(length)
        )
    whole["position_ids"] = whole["position_ids"].to(tokens.device).expand(batch_size, -1)
    if "labels" in whole or "shift_labels" in whole:
        if "shift_labels" not in whole:
            whole["shift_labels"] = pad(whole["labels"], (0, 1), value=IGNORED)[:, 1:]
        whole["labels"] = whole["shift_labels"]
        _refuse_padded_targets(whole["shift_labels"], batch.get("attention_mask"))
    return batch, rows, whole


def positions_in_documents(rows: tuple[tuple[masks.Document, ...], ...], length: int) -> torch.Tensor:
    """Where each token of packed rows stands in its document; after the last one, in its row: `[B, length]`."""
    positions = torch.arange(length).repeat(len(rows), 1)
    for row, documents in enumerate(rows):
        for (start, stop), *_ in documents:  # which packing leaves whole
            positions[row, start:stop] -= start
    return positions


def take_columns(tensor: torch.Tensor, positions: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    """The columns `positions` of `[B, S, ...]`, filled up to `length` columns."""
    filled = pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, length - tensor.shape[1]), value=fill)
    return filled.index_select(1, positions)


def _documents(batch: Mapping[str, Any], batch_size: int, length: int) -> tuple[tuple[masks.Document, ...], ...]:
    """The documents of each row, from whichever input says it."""
    mask, position_ids, cu_seqlens = (batch.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    packed = position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any())
    if mask is not None and (packed or cu_seqlens is not None):
        source = "cu_seq_lens_q" if cu_seqlens is not None else "position_ids that step by other than 1"
        raise ValueError(
            f"the batch has both an attention_mask and {source}: packed rows have no padding mask, and with one, "
            "Transformers lets documents see each other. Leave the attention_mask out, to keep the documents apart; "
            "or give position_ids that count up by 1 (or none), to make each row one document."
        )
    if cu_seqlens is None and "cu_seq_lens_k" in batch:
        raise ValueError(
            "the batch has cu_seq_lens_k and no cu_seq_lens_q, from which documents are read. Give both, the same."
        )
    if cu_seqlens is not None:
        keys = batch.get("cu_seq_lens_k", cu_seqlens)
        if batch_size != 1 or not torch.equal(keys, cu_seqlens):
            raise ValueError(
                f"cu_seq_lens_q describes one flattened row, with cu_seq_lens_k the same; the batch has {batch_size} "
                f"row(s) and cu_seq_lens_k={masks.shortened(keys.tolist())}. Flatten the batch, or give position_ids "
                "that begin again in each document."
            )
        row = masks.from_cu_seqlens(cu_seqlens, length)
        if packed:
            edges = {start for document in row for start, _ in document}
            resets = {start for document in masks.from_position_ids(position_ids)[0] for start, _ in document}
            if not resets <= edges:
                raise ValueError(
                    f"position_ids begin again at token {min(resets - edges)}, where cu_seq_lens_q has no document "
                    "begin. Leave one of the two out."
                )
        return (row,)
    if mask is not None:
        return masks.from_attention_mask(mask)
    if packed:
        return masks.from_position_ids(position_ids.expand(batch_size, -1))
    return masks.whole_rows(batch_size, length)


def _refuse_unknown(batch: Mapping[str, Any]) -> None:
    """Refuse what cannot be sharded or would change the result."""
    for name, value in batch.items():
        if name in (*PADDING, *CONSUMED[:3]) and not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{name} is a {type(value).__name__} and must be a tensor; torch.tensor({name}) makes it one."
            )
        if name == SHARD:
            raise ValueError("the batch is sharded already; give cp.shard what the collator yields, or a whole batch.")
        if name == "use_cache" and value:
            raise ValueError(
                "use_cache=True: keys of a shard cannot be cached. Leave it out, or call the model unsharded."
            )
        if name not in (*PADDING, *CONSUMED, *PASSED_ON) and value is not False:
            raise ValueError(
                f"the batch has {name!r}, and it is not known how that is sharded. Known are {', '.join(PADDING)}, "
                f"{', '.join(CONSUMED)}. Remove it from the batch if the model does not need it."
            )


def _check_shapes(batch: Mapping[str, Any], batch_size: int, length: int) -> None:
    """Refuse inputs that do not describe the same rows of tokens."""
    if batch_size == 0 or length == 0:
        raise ValueError(f"the batch is empty: {batch_size} rows of {length} tokens. Leave it out.")
    for name in (*PADDING, "attention_mask"):
        if name not in batch:
            continue
        shape = tuple(batch[name].shape)
        if name == "attention_mask" and len(shape) != 2:
            raise ValueError(
                f"attention_mask has shape {shape}: only a 2-D padding mask can be sharded. Give documents as "
                "position_ids that begin again, or as cu_seq_lens_q."
            )
        rows = (1, batch_size) if name == "position_ids" else (batch_size,)
        if len(shape) != (3 if name == "inputs_embeds" else 2) or shape[0] not in rows or shape[1] != length:
            hint = " Of text alone the axes of M-RoPE are the same: leave it out." if len(shape) == 3 else ""
            raise ValueError(
                f"{name} has shape {shape}; with {batch_size} rows of {length} tokens it must begin with these, and "
                f"have {3 if name == 'inputs_embeds' else 2} dimensions.{hint if name == 'position_ids' else ''}"
            )


def _refuse_padded_targets(shift_labels: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Padding is never a target, and nothing is predicted from padding that follows a token.

    Padding before the first token reads nothing, here as in SDPA, so the first token may be predicted from it.
    """
    if attention_mask is None:
        return
    tokens = attention_mask.bool().to(shift_labels.device)
    follows_token = tokens.cumsum(dim=1) > 0
    unusable = ~pad(tokens, (0, 1), value=True)[:, 1:] | (~tokens & follows_token)
    wrong = ((shift_labels != IGNORED) & unusable).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"row {row} has a label other than {IGNORED} for token {column + 1}, which is padding or is predicted "
            f"from padding that follows a token, by the attention_mask ({len(wrong)} such). Set labels to "
            f"{IGNORED} where attention_mask is 0, and for the first token after padding inside a row."
        )
