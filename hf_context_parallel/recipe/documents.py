"""Data of a recipe: documents, the rows that a model trains on, and the collator that batches them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from hf_context_parallel.data.batch import IGNORED
from hf_context_parallel.recipe.content import COLUMNS, LABELS, check_content, check_lengths
from hf_context_parallel.recipe.counts import (
    FATE,
    KEPT,
    LOST,
    SHORT,
    TARGETS,
    TOKENS,
    UNLEARNT,
    Counts,
    Tally,
    count_documents,
    with_rows,
)
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.files import check_files
from hf_context_parallel.recipe.schema import DataSection
from hf_context_parallel.recipe.trl_columns import TrlColumns

ROWS = ("input_ids", LABELS)
"""Columns of the rows that a model trains on."""


def load_documents(section: DataSection, split: str, trl: TrlColumns | None = None) -> Dataset | IterableDataset:
    """Load the documents of a split by `datasets.load_dataset`.

    Args:
        trl: columns of the trainer of TRL, if there is one.

    Raises:
        RecipeError: if `load_dataset` cannot find or read them.
    """
    try:
        return load_dataset(
            section.path,
            section.name,
            split=split,
            data_files=section.data_files,
            data_dir=section.data_dir,
            **section.options,
        )
    except Exception as error:  # files, formats and networks raise exceptions of many kinds
        raise _unreadable(section, error, trl) from error


def _unreadable(section: DataSection, error: Exception, trl: TrlColumns | None = None) -> RecipeError:
    """Make the error of data that cannot be read. It names the file and the line where these are found.

    Raises:
        RecipeError: with the file.
    """
    check_files(section, trl, seconds=math.inf)
    return RecipeError(
        f"data.path: {section.path!r} cannot be loaded ({type(error).__name__}: {error}). Give a hub id or a folder "
        "that `load_dataset` reads."
    )


def to_rows(
    documents: Dataset | IterableDataset,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    tally: Tally | None = None,
) -> Dataset | IterableDataset:
    """Make rows of `input_ids` and `labels`, of at most `max_length` tokens.

    A packed row holds a list of documents in each column, and an unpacked row holds one document. Documents without a
    token to predict are left out: those of fewer than two tokens, and those whose labels are all -100.

    Args:
        tally: what counts the documents. Those of a stream are counted while it is read.

    Raises:
        RecipeError: if the documents lack the column, no document is left, a document is not of the format, or has
            more or fewer labels than tokens, or chats come without a chat template.
    """
    tally = tally or Tally()
    column = section.column or COLUMNS[section.format]
    present = documents.column_names  # None for a stream, whose columns are known only after reading
    if present is not None and column not in present:
        raise RecipeError(f"data.column: no column {column!r} in {section.path!r}. Name one of {', '.join(present)}.")
    if section.format == "chat" and tokenizer.chat_template is None:
        raise RecipeError(
            "data.format: 'chat' needs a chat template, and the tokenizer has none. Name another in model.tokenizer."
        )
    cut = None if section.packing else section.max_length
    encode = partial(
        encode_documents, column=column, form=section.format, tokenizer=tokenizer, cut=cut, path=section.path
    )
    if isinstance(documents, Dataset):
        return _rows(documents, encode, section, tally)
    encoded = documents.map(
        partial(_count, tally=tally, encode=encode, packing=section.packing),
        True,
        batched=True,
        remove_columns=present,
    )
    if _first(encoded, section) is None:
        raise _nothing_to_predict(section, tally.counts())
    tally.clear()
    encoded = encoded.select_columns([*ROWS])
    if not section.packing:
        return encoded
    return encoded.map(partial(_count_packed, tally=tally, max_length=section.max_length), batched=True)


def _rows(documents: Dataset, encode: Callable[..., Any], section: DataSection, tally: Tally) -> Dataset:
    """Make rows of a data set that is not a stream. The counts come from the cache where the rows do."""
    encoded = documents.map(encode, with_indices=True, batched=True, remove_columns=documents.column_names)
    counts = count_documents(encoded) if len(encoded) else Counts(0)
    dropped = sum(counts.dropped.values())
    if dropped == counts.documents:
        raise _nothing_to_predict(section, counts)
    kept = encoded.filter(_is_kept, input_columns=FATE, batched=True) if dropped else encoded
    rows = kept
    if section.packing:
        pieces = partial(pack, max_length=section.max_length)
        rows = kept.select_columns([*ROWS]).map(pieces, batched=True)
    # Documents that are dropped have neither tokens nor targets.
    tally.known = with_rows(counts, rows if section.packing else encoded, len(rows))
    return rows.select_columns([*ROWS])


def _is_kept(fates: list[int]) -> list[bool]:
    return [fate == KEPT for fate in fates]


def _count(
    batch: dict[str, list], indices: list[int], tally: Tally, encode: Callable[..., Any], packing: bool
) -> dict[str, list]:
    """Encode a batch of a stream, count it, and leave out the documents that are dropped."""
    encoded = encode(batch, indices)
    fates = encoded[FATE]
    tally.add(
        documents=len(fates),
        short=fates.count(SHORT),
        unlearnt=fates.count(UNLEARNT),
        cut=sum(lost > 0 for lost in encoded[LOST]),
        lost=sum(encoded[LOST]),
        tokens=0 if packing else sum(encoded[TOKENS]),
        targets=0 if packing else sum(encoded[TARGETS]),
    )
    return {name: [x for x, fate in zip(encoded[name], fates, strict=True) if fate == KEPT] for name in ROWS}


def _count_packed(batch: dict[str, list], tally: Tally, max_length: int) -> dict[str, list]:
    """Pack a batch of a stream, and count its tokens and targets, of which packing splits off some."""
    packed = pack(batch, max_length)
    tally.add(tokens=sum(packed.pop(TOKENS)), targets=sum(packed.pop(TARGETS)))
    return packed


def _first(rows: IterableDataset, section: DataSection) -> Any:
    """Read the first row of a stream. It is None if there is none.

    Raises:
        RecipeError: if the stream cannot be read.
    """
    try:
        return next(iter(rows), None)
    except RecipeError:
        raise
    except Exception as error:  # files, formats and networks raise exceptions of many kinds
        raise _unreadable(section, error) from error


def _nothing_to_predict(section: DataSection, counts: Counts) -> RecipeError:
    return RecipeError(
        f"data: {section.path!r} has no document with a token to predict: of two tokens or more, with a label other "
        f"than {IGNORED} behind its first. {counts} Check data.path, data.column and data.max_length."
    )


def encode_documents(
    batch: dict[str, list],
    indices: list[int],
    column: str,
    form: str,
    tokenizer: PreTrainedTokenizerBase,
    cut: int | None,
    path: str,
) -> dict[str, list]:
    """Encode a batch of documents as `input_ids` and `labels`, each of at most `cut` tokens, with what is counted.

    Documents without a token to predict are empty, and the column `FATE` says why.

    Args:
        indices: the number of each document in the data set.
        path: words for the data set in errors.
    """
    if column not in batch:  # of a stream
        raise RecipeError(f"data.column: no column {column!r} in {path!r}. Name one of {', '.join(batch)}.")
    wheres = [f"document {index + 1} of {path!r}" for index in indices]
    for content, where in zip(batch[column], wheres, strict=True):
        check_content(content, form, column, where)
    labels = None
    if form == "tokens":
        documents = batch[column]
        labels = batch.get(LABELS)
    elif form == "chat":
        try:
            documents = tokenizer.apply_chat_template(batch[column], return_dict=True)["input_ids"]
        except Exception as error:  # templates raise exceptions of many kinds
            raise RecipeError(
                f"data: the chat template refuses a chat among the documents {indices[0] + 1} to {indices[-1] + 1} of "
                f"{path!r} ({type(error).__name__}: {error}). Correct the chat, or name another model.tokenizer."
            ) from error
    else:
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        documents = [ids if ids[-1:] == eos else ids + eos for ids in tokenizer(batch[column])["input_ids"]]
    encoded: dict[str, list] = {name: [] for name in (*ROWS, FATE, LOST, TOKENS, TARGETS)}
    for ids, targets, where in zip(documents, labels or documents, wheres, strict=True):
        if labels is not None:
            check_content(targets, "tokens", LABELS, where)
        check_lengths(ids, targets, where)
        lost = 0 if cut is None else max(len(ids) - cut, 0)
        ids, targets = ids[:cut], targets[:cut]
        learnt = sum(label != IGNORED for label in targets[1:])
        fate = KEPT if learnt else SHORT if len(ids) < 2 else UNLEARNT
        if fate != KEPT:
            ids, targets, lost = [], [], 0
        row = {"input_ids": ids, LABELS: targets, FATE: fate, LOST: lost, TOKENS: len(ids), TARGETS: learnt}
        for name, value in row.items():
            encoded[name].append(value)
    return encoded


def pack(batch: dict[str, list[list[int]]], max_length: int) -> dict[str, list]:
    """Pack documents one after another into rows of `max_length` tokens. The last row of a batch may be shorter.

    `TOKENS` and `TARGETS` are counted for each row.

    A document that does not fit into a row is split, and the rest is a separate document in the next row.
    """
    rows: list[list[tuple[int, slice]]] = []
    room = 0
    for index, document in enumerate(batch["input_ids"]):
        start = 0
        while start < len(document):
            if room == 0:
                rows.append([])
                room = max_length
            stop = min(start + room, len(document))
            rows[-1].append((index, slice(start, stop)))
            room -= stop - start
            start = stop
    packed: dict[str, list] = {
        column: [[documents[index][piece] for index, piece in row] for row in rows]
        for column, documents in batch.items()
    }
    packed[TOKENS] = [sum(map(len, row)) for row in packed["input_ids"]]
    packed[TARGETS] = [sum(label != IGNORED for piece in row for label in piece[1:]) for row in packed[LABELS]]
    return packed


def make_collator(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Make the collator of whole batches, `[1, tokens]` with packing and `[rows, longest row]` without.

    Packed batches have `position_ids` that restart with each document, and no `attention_mask`. Other batches have an
    `attention_mask`, and labels of -100 where it is 0.
    """
    if section.packing:
        return PackedCollator()
    return DataCollatorForSeq2Seq(tokenizer)


class PackedCollator:
    """Collator that joins the documents of packed rows into one flattened row."""

    def __init__(self) -> None:
        self.flatten = DataCollatorWithFlattening()

    def __call__(self, rows: list[dict[str, list[list[int]]]]) -> dict[str, Any]:
        return self.flatten(
            [
                {"input_ids": ids, "labels": labels}
                for row in rows
                for ids, labels in zip(row["input_ids"], row["labels"], strict=True)
            ]
        )
