"""Data of a recipe: documents, the rows that a model trains on, and the collator that batches them."""

from __future__ import annotations

from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from hf_context_parallel.data.batch import IGNORED
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.schema import DataSection

COLUMNS = {"text": "text", "chat": "messages", "tokens": "input_ids"}
"""Default column of the documents, by their format."""


def load_documents(section: DataSection, split: str) -> Dataset | IterableDataset:
    """Load the documents of a split by `datasets.load_dataset`.

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
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(
            f"data.path: {section.path!r} cannot be loaded ({type(error).__name__}: {error}). Give a hub id "
            "or a folder that `load_dataset` reads."
        ) from error


def to_rows(
    documents: Dataset | IterableDataset, section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> Dataset | IterableDataset:
    """Make rows of `input_ids` and `labels`, of at most `max_length` tokens.

    A packed row holds a list of documents in each column, and an unpacked row holds one document. Documents without a
    token to predict are left out: those of fewer than two tokens, and those whose labels are all -100.

    Raises:
        RecipeError: if the documents lack the column, no document is left, a document has more or fewer labels than
            tokens, or chats come without a chat template.
    """
    column = section.column or COLUMNS[section.format]
    present = documents.column_names  # None for a stream, whose columns are known only after reading
    if present is not None and column not in present:
        raise RecipeError(f"data.column: no column {column!r} in {section.path!r}. Name one of {', '.join(present)}.")
    if section.format == "chat" and tokenizer.chat_template is None:
        raise RecipeError(
            "data.format: 'chat' needs a chat template, and the tokenizer has none. Name another in model.tokenizer."
        )
    cut = None if section.packing else section.max_length
    encode = partial(encode_documents, column=column, form=section.format, tokenizer=tokenizer, cut=cut)
    encoded = documents.map(encode, batched=True, remove_columns=present)
    if next(iter(encoded), None) is None:
        raise RecipeError(
            f"data: {section.path!r} has no document with a token to predict: of two tokens or more, with a label "
            f"other than {IGNORED} behind its first. Check data.path, data.column and data.max_length."
        )
    encoded = encoded.select_columns(["input_ids", "labels"])
    return encoded.map(partial(pack, max_length=section.max_length), batched=True) if section.packing else encoded


def encode_documents(
    batch: dict[str, list], column: str, form: str, tokenizer: PreTrainedTokenizerBase, cut: int | None
) -> dict[str, list[list[int]]]:
    """Encode a batch of documents as `input_ids` and `labels`, each of at most `cut` tokens."""
    if form == "tokens":
        documents = batch[column]
    elif form == "chat":
        documents = tokenizer.apply_chat_template(batch[column], return_dict=True)["input_ids"]
    else:
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        documents = [ids if ids[-1:] == eos else ids + eos for ids in tokenizer(batch[column])["input_ids"]]
    # Only documents of token ids can have a column of labels.
    labels = batch.get("labels", documents) if form == "tokens" else documents
    for ids, targets in zip(documents, labels):
        if len(ids) != len(targets):
            raise RecipeError(
                f"data: a document has {len(ids)} input_ids and {len(targets)} labels. Give each token a label, "
                f"{IGNORED} where it is not to be learnt."
            )
    pairs = [(ids[:cut], targets[:cut]) for ids, targets in zip(documents, labels)]
    kept = [pair for pair in pairs if any(label != IGNORED for label in pair[1][1:])]
    return {"input_ids": [ids for ids, _ in kept], "labels": [targets for _, targets in kept]}


def pack(batch: dict[str, list[list[int]]], max_length: int) -> dict[str, list[list[list[int]]]]:
    """Pack documents one after another into rows of `max_length` tokens. The last row of a batch may be shorter.

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
    return {
        column: [[documents[index][piece] for index, piece in row] for row in rows]
        for column, documents in batch.items()
    }


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
