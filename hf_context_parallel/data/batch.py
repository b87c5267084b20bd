"""Reading of a whole batch: its documents, its targets, and the refusal of inputs that cannot be sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from ..distributed.host import on_host, to_device
from ..planning import mask as masks

IGNORED = -100
"""Label of the tokens that the loss leaves out."""
SHARD = "context_parallel_shard"
"""Key under which a sharded batch holds its `Shard`."""
AXES = "position_axes"
"""Key under which a batch that is read holds positions on several axes."""
TEXT_AND_AXES = 4
"""Number of axes of positions whose first is the position in the text."""
PADDING = {
    "input_ids": 0,
    "inputs_embeds": 0,
    "token_type_ids": 0,
    "position_ids": 0,
    "position_axes": 0,
    "labels": IGNORED,
    "shift_labels": IGNORED,
}
"""Inputs whose second dimension is the sequence, each with the value that pads it."""
CONSUMED = ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "max_length_q", "max_length_k")
"""Inputs that describe the documents. A shard does not hold them, because its plan describes the documents."""
COUNTED = ("input_ids", "token_type_ids", "position_ids", "labels", "shift_labels", *CONSUMED[1:4])
"""Inputs that hold integers."""
PASSED_ON = ("num_items_in_batch", "return_dict", "output_hidden_states")
"""Inputs that have the same meaning for a shard and for the whole batch. They are passed on unchanged."""


def read_batch(batch: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[tuple[masks.Document, ...], ...], dict]:
    """Read a whole batch, on the host.

    Returns:
        The inputs that are not None, the documents of each row, and the inputs with a sequence dimension, `[B, S]` or
        `[B, S, hidden]`. All are on the host but `inputs_embeds`, which is not read. The last include the
        `position_ids` and the `shift_labels` that one process would make. If the batch has labels, `labels` is the
        same tensor as `shift_labels`. If a token has a position on each of k axes, these are `AXES`, `[B, S, k]`, and
        `position_ids` are those in the text.

    Raises:
        ValueError: if the batch holds an input that cannot be exact on a shard, as for `shard_batch`.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"the batch is a {type(batch).__name__}, and it must be a dict of tensors, such as input_ids and labels. "
            "Collate lists of samples first, or give the inputs their names."
        )
    batch = {name: _read(name, value) for name, value in batch.items() if value is not None}
    axes = _take_axes(batch)
    if "input_ids" not in batch and "inputs_embeds" not in batch:
        raise ValueError(
            f"the batch has neither input_ids nor inputs_embeds, only {sorted(batch)}. Add one of the two."
        )
    _refuse_unknown(batch)
    _check_dtypes(batch)
    name = "input_ids" if "input_ids" in batch else "inputs_embeds"
    if batch[name].dim() < 2:
        raise ValueError(f"{name} has shape {tuple(batch[name].shape)}, without rows. Give one row as {name}[None].")
    batch_size, length = batch[name].shape[:2]
    _check_shapes(batch, batch_size, length)
    rows = _documents(batch, batch_size, length)
    if "seq_idx" in batch:
        _check_seq_idx(batch["seq_idx"], rows, length)

    whole = {name: batch[name] for name in PADDING if name in batch}
    if "position_ids" not in whole:
        whole["position_ids"] = (
            positions_in_documents(rows, length) if "cu_seq_lens_q" in batch else torch.arange(length)
        )
    whole["position_ids"] = whole["position_ids"].expand(batch_size, -1)
    if axes is not None:
        if tuple(axes.shape[1:]) not in ((batch_size, length), (1, length)):
            raise ValueError(
                f"position_ids has shape {tuple(axes.shape)}, and the batch has {batch_size} rows of {length} tokens. "
                "Give [B, S], or [k, B, S] for positions on k axes."
            )
        whole[AXES] = axes.expand(-1, batch_size, -1).permute(1, 2, 0)
    if "labels" in whole or "shift_labels" in whole:
        if "shift_labels" not in whole:
            whole["shift_labels"] = pad(whole["labels"], (0, 1), value=IGNORED)[:, 1:]
        whole["labels"] = whole["shift_labels"]
        _refuse_padded_targets(whole["shift_labels"], batch.get("attention_mask"))
    return batch, rows, whole


def _read(name: str, value: Any) -> Any:
    read = name in (*PADDING, *CONSUMED) and name != "inputs_embeds" and isinstance(value, torch.Tensor)
    return on_host(value) if read else value


def _take_axes(batch: dict[str, Any]) -> torch.Tensor | None:
    """Take positions on several axes, `[k, B, S]`, out of a batch, and leave its positions in the text.

    Of four axes the first is the position in the text, as in the models of Transformers. Others have none.
    """
    positions = batch.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.dim() != 3:
        return None
    del batch["position_ids"]
    if len(positions) == TEXT_AND_AXES:
        batch["position_ids"] = positions[0]
    return positions


def positions_in_documents(rows: tuple[tuple[masks.Document, ...], ...], length: int) -> torch.Tensor:
    """Compute the position of each token in its document, `[B, length]`.

    Tokens after the last document get their position in the row.
    """
    positions = torch.arange(length).repeat(len(rows), 1)
    for row, documents in enumerate(rows):
        for (start, stop), *_ in documents:  # packing never splits a document into several stretches
            positions[row, start:stop] -= start
    return positions


def take_columns(tensor: torch.Tensor, positions: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    """Take the columns `positions` of a tensor `[B, S, ...]` that is first padded with `fill` to `length` columns.

    Args:
        positions: `[n]`, on the host.
    """
    filled = pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, length - tensor.shape[1]), value=fill)
    return filled.index_select(1, to_device(positions, tensor.device))


def _documents(batch: Mapping[str, Any], batch_size: int, length: int) -> tuple[tuple[masks.Document, ...], ...]:
    """Find the documents of each row, from `cu_seq_lens_q`, `attention_mask` or `position_ids`."""
    mask, position_ids, cu_seqlens = (batch.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    packed = position_ids is not None and _begins_again(position_ids, mask)
    if mask is not None and bool((mask > 1).any()):
        raise ValueError(
            f"attention_mask has the value {int(mask.max())}, and Transformers reads it as 1, so that documents that "
            "it counts see each other. Describe documents by position_ids that begin again, or by cu_seq_lens_q, and "
            "leave the attention_mask out."
        )
    if mask is not None and (packed or cu_seqlens is not None):
        source = "cu_seq_lens_q" if cu_seqlens is not None else "position_ids that do not count up by 1"
        raise ValueError(
            f"the batch has both an attention_mask and {source}, and with an attention_mask Transformers lets packed "
            "documents see each other. To keep the documents apart, remove the attention_mask; to make each row one "
            "document, give position_ids that count up by 1, or none."
        )
    if cu_seqlens is None and "cu_seq_lens_k" in batch:
        raise ValueError(
            "the batch has cu_seq_lens_k and no cu_seq_lens_q, from which documents are read. Add cu_seq_lens_q with "
            "the same values."
        )
    if cu_seqlens is not None:
        keys = batch.get("cu_seq_lens_k", cu_seqlens)
        if batch_size != 1 or not torch.equal(keys, cu_seqlens):
            raise ValueError(
                f"cu_seq_lens_q needs one flattened row and an equal cu_seq_lens_k, and the batch has {batch_size} "
                f"row(s) and cu_seq_lens_k={masks.shortened(keys.flatten().tolist())}. Flatten the batch, or give "
                "position_ids that begin again in each document."
            )
        row = masks.from_cu_seqlens(cu_seqlens, length)
        if packed:
            edges = {start for document in row for start, _ in document}
            resets = {start for document in masks.from_position_ids(position_ids)[0] for start, _ in document}
            if not resets <= edges:
                raise ValueError(
                    f"position_ids begin again at token {min(resets - edges)}, and no document of cu_seq_lens_q "
                    "begins there. Remove one of the two."
                )
        return (row,)
    if mask is not None:
        return masks.from_attention_mask(mask)
    if packed:
        return masks.from_position_ids(position_ids.expand(batch_size, -1))
    return masks.whole_rows(batch_size, length)


def _begins_again(position_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether positions do not count up by 1 somewhere. Positions of padding do not matter."""
    jumps = position_ids.diff(dim=-1) != 1
    if mask is not None and mask.dim() == 2 and mask.shape[1] == position_ids.shape[1]:
        tokens = mask.bool()
        jumps = jumps & tokens[:, 1:] & tokens[:, :-1]
    return bool(jumps.any())


def _check_seq_idx(seq_idx: torch.Tensor, rows: tuple[tuple[masks.Document, ...], ...], length: int) -> None:
    """Refuse a `seq_idx` that does not number the documents which other inputs describe."""
    numbers = torch.zeros(len(rows), length, dtype=torch.long)
    for row, documents in enumerate(rows):
        for number, document in enumerate(documents):
            for start, stop in document:
                numbers[row, start:stop] = number
    fits = seq_idx.dim() == 2 and seq_idx.shape[0] in (1, len(rows)) and seq_idx.shape[1] == length
    if not fits or not torch.equal(seq_idx.expand(len(rows), -1).diff() != 0, numbers.diff() != 0):
        raise ValueError(
            "seq_idx numbers other documents than position_ids or cu_seq_lens_q describe. Give position_ids that "
            "begin again in each document of seq_idx, or leave it out."
        )


def _refuse_unknown(batch: Mapping[str, Any]) -> None:
    """Refuse inputs that cannot be sharded or that would change the result."""
    for name, value in batch.items():
        if name in (*PADDING, *CONSUMED[:4]) and not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{name} is a {type(value).__name__}, and it must be a tensor. Give torch.tensor({name})."
            )
        if name == SHARD:
            raise ValueError(
                "the batch is sharded already. Give cp.shard the batch that the collator yields, or a whole batch."
            )
        if name == "use_cache" and value is not False:
            raise ValueError(
                "use_cache=True asks for a key/value cache, which a shard cannot fill. Remove it, or call the model "
                "on whole sequences."
            )
        if name not in (*PADDING, *CONSUMED, *PASSED_ON) and value is not False:
            raise ValueError(
                f"the batch has {name!r}, which cannot be sharded. Call a model that hcp.parallelize has prepared "
                "with the whole batch, as images need it, or remove it if the model does not need it; the inputs that "
                f"can be sharded are {', '.join(PADDING)}, {', '.join(CONSUMED)}."
            )


def _check_dtypes(batch: Mapping[str, Any]) -> None:
    """Refuse numbers that are not integers, and masks with other values than 0 and 1."""
    for name in COUNTED:
        value = batch.get(name)
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            raise ValueError(
                f"{name} has the dtype {value.dtype}, and it must hold integers. Make it with dtype=torch.long, or "
                f"find out where it became {value.dtype}: {name}.long() drops fractions."
            )
    mask = batch.get("attention_mask")
    if mask is not None and mask.is_floating_point():
        wrong = mask[(mask != 0) & (mask != 1)]  # NaN is unequal to both
        if len(wrong):
            raise ValueError(
                f"attention_mask has {len(wrong)} values other than 0 and 1, the first of them {float(wrong[0])}. A "
                "padding mask is 1 at tokens and 0 at padding; give it as integers or bools."
            )


def _check_shapes(batch: Mapping[str, Any], batch_size: int, length: int) -> None:
    """Refuse inputs whose shapes do not agree on the rows and tokens of the batch."""
    if batch_size == 0 or length == 0:
        raise ValueError(f"the batch is empty: {batch_size} rows of {length} tokens. Skip it.")
    for name in (*PADDING, "attention_mask"):
        if name not in batch:
            continue
        shape = tuple(batch[name].shape)
        if name == "attention_mask" and len(shape) != 2:
            raise ValueError(
                f"attention_mask has shape {shape}, and only a 2-D padding mask can be sharded. Describe documents by "
                "position_ids that begin again, or by cu_seq_lens_q."
            )
        rows = (1, batch_size) if name == "position_ids" else (batch_size,)
        if len(shape) != (3 if name == "inputs_embeds" else 2) or shape[0] not in rows or shape[1] != length:
            raise ValueError(
                f"{name} has shape {shape}, and the batch has {batch_size} rows of {length} tokens. Its shape must "
                f"begin with these, and have {3 if name == 'inputs_embeds' else 2} dimensions."
            )


def _refuse_padded_targets(shift_labels: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Refuse labels for padding, and labels that are predicted from padding that follows a token.

    The first token may be predicted from the padding before it: that padding reads no keys, here as in SDPA.
    """
    if attention_mask is None:
        return
    tokens = attention_mask.bool()
    follows_token = tokens.cumsum(dim=1) > 0
    unusable = ~pad(tokens, (0, 1), value=True)[:, 1:] | (~tokens & follows_token)
    wrong = ((shift_labels != IGNORED) & unusable).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"row {row} has a label other than {IGNORED} for token {column + 1}, and by the attention_mask that token "
            f"is padding or is predicted from padding that follows a token ({len(wrong)} such labels). Set labels to "
            f"{IGNORED} where attention_mask is 0, and for the first token after padding inside a row."
        )
