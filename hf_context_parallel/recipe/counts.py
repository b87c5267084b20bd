"""Counts of what a run reads: documents, those that are dropped or cut, tokens and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import pyarrow.compute as pc
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import get_worker_info
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_context_parallel.data.batch import IGNORED
from hf_context_parallel.recipe.errors import RecipeError

KEPT, SHORT, UNLEARNT, EMPTY = range(4)
"""Fates of a document, as the column `FATE` says."""
FATE, LOST, TOKENS, TARGETS = "fate", "lost", "tokens", "targets"
"""Columns of documents and rows: their fate, and numbers of tokens that are cut off, are left and are learnt."""
WORDS = {
    SHORT: "of fewer than two tokens",
    UNLEARNT: f"without a label other than {IGNORED} behind the first, within data.max_length",
    EMPTY: "without a text or a message",
}
"""Reasons for which documents are dropped."""
FIGURES = ("documents", "short", "unlearnt", "empty", "cut", "lost", "tokens", "targets")
"""Names of what a `Tally` counts. The fates are numbered as here."""
SEQUENCES = "seq_lengths"
"""Column in which TRL keeps the lengths of the documents of a packed row."""
WORKERS = 256
"""Number of workers of a loader that count apart from each other."""


@dataclass
class Counts:
    """Counts of the documents of one split.

    Args:
        documents: documents read. It is None before a stream is read.
        dropped: number of documents dropped, by reason.
        cut: documents that lost tokens at `max_length`.
        lost: the tokens that they lost.
        rows: rows of an epoch, if they are known.
        tokens: tokens of an epoch, or of what has been read until now, padding not included.
        targets: tokens that are learnt among them.
        growing: True if more are counted while the run reads.
        notes: sentences on what is not counted.
    """

    documents: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    lost: int = 0
    rows: int | None = None
    tokens: int | None = None
    targets: int | None = None
    growing: bool = False
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Write the counts in sentences. What is lost is a warning."""
        if self.documents is None:
            return "a stream, counted while it is read."
        parts = [f"{self.documents:,} documents read"]
        dropped = {words: number for words, number in self.dropped.items() if number}
        parts += [f"{number:,} dropped, {words}" for words, number in dropped.items()]
        if self.cut:
            whole = self.lost + (self.tokens or 0)
            parts.append(f"{self.cut:,} cut, which lose {self.lost:,} of {whole:,} tokens ({self.lost / whole:.1%})")
        sentences = ["; ".join(parts) + "."]
        rows = [] if self.rows is None else [f"{self.rows:,} rows"]
        figures = {"tokens": self.tokens, "targets": self.targets}
        known = [f"{number:,} {name}" for name, number in figures.items() if number is not None]
        of_epoch = rows if self.growing else rows + known
        if of_epoch:
            sentences.append(f"An epoch has {', '.join(of_epoch)}.")
        if self.growing:
            sentences.append(f"Read until now: {', '.join(known)}.")
        if self.cut:
            sentences.append("Raise data.max_length to lose less.")
        text = " ".join([*sentences, *self.notes])
        return f"Warning: {text}" if dropped or self.cut else text


class Tally:
    """Counts of a split, of which some grow while documents are read, also in the workers of a loader.

    Those that grow are in shared memory, where each worker has a row of its own.

    Args:
        shared: True if each group counts its own batches, as a collator does, and False if each rank reads all.
    """

    def __init__(self, shared: bool = False) -> None:
        self.known: Counts | None = None
        self.shared = shared
        self._rows = torch.zeros(WORKERS, len(FIGURES), dtype=torch.int64).share_memory_()

    def __deepcopy__(self, _: Any) -> Tally:
        """Return this tally itself, since a copy of a data set is read in its place."""
        return self

    def add(self, **figures: int) -> None:
        """Add to the counts of the names in `FIGURES`."""
        worker = get_worker_info()
        row = self._rows[0 if worker is None else (worker.id + 1) % WORKERS]
        for name, number in figures.items():
            row[FIGURES.index(name)] += number

    def clear(self) -> None:
        """Begin again at zero."""
        self._rows.zero_()

    def counts(self, ranks_of_group: int | None = None) -> Counts:
        """Return what has been counted until now.

        Args:
            ranks_of_group: ranks that count the same batches. Unless it is None, all ranks call this together, and get
                the counts of all.
        """
        if self.known is not None and self.known.tokens is not None:
            return self.known
        sums = self._rows.sum(0).tolist()
        if ranks_of_group is not None and self.shared and dist.is_initialized():
            sums_of_all: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(sums_of_all, sums)
            sums = [sum(column) // ranks_of_group for column in zip(*sums_of_all, strict=True)]
        found = dict(zip(FIGURES, sums, strict=True))
        if self.known is None and not found["documents"]:
            return Counts()
        dropped = {words: found[FIGURES[fate]] for fate, words in WORDS.items()}
        known = self.known or Counts(found["documents"], dropped)
        if not found["tokens"]:
            return known
        running = {name: found[name] for name in ("cut", "lost", "tokens", "targets")}
        return replace(known, growing=True, **running)


def count_documents(encoded: Dataset) -> Counts:
    """Count documents by their columns `FATE` and `LOST`, which are in the cache of the data set with its tokens."""
    fates, lost = (encoded.data.column(name) for name in (FATE, LOST))
    dropped = {words: pc.sum(pc.equal(fates, fate)).as_py() or 0 for fate, words in WORDS.items()}
    return Counts(len(encoded), dropped, pc.sum(pc.greater(lost, 0)).as_py() or 0, pc.sum(lost).as_py() or 0)


def with_rows(counts: Counts, rows: Dataset, number: int) -> Counts:
    """Add rows, tokens and targets of an epoch, by the columns `TOKENS` and `TARGETS` of rows.

    Args:
        number: the number of rows.
    """
    tokens, targets = (pc.sum(rows.data.column(name)).as_py() or 0 for name in (TOKENS, TARGETS))
    return replace(counts, rows=number, tokens=tokens, targets=targets)


def count_prepared(documents: Any, prepared: Any, trainer: str) -> Counts:
    """Count what a trainer of TRL has made of documents, as far as it shows.

    Raises:
        RecipeError: if no row is left, or no row has a target.
    """
    if not isinstance(documents, Dataset) or not isinstance(prepared, Dataset):
        return Counts(notes=["Tokens are not counted."])
    counts = Counts(len(documents), rows=len(prepared))
    if not len(prepared):
        raise RecipeError(
            f"data: trainer={trainer!r} leaves no row of {len(documents)} documents. Raise data.max_length, or "
            "correct the documents."
        )
    columns = prepared.column_names
    if "input_ids" not in columns:
        counts.notes.append(f"Tokens, and what {trainer} drops or cuts, are made in batches, and not counted.")
        return counts
    names = [name for name in ("input_ids", "labels", SEQUENCES) if name in columns]
    tokens, targets = 0, 0
    for batch in prepared.select_columns(names).with_format("arrow").iter(1000):
        tokens += pc.sum(pc.list_value_length(batch.column("input_ids"))).as_py() or 0
        if "labels" in names:
            sequences = batch.column(SEQUENCES).to_pylist() if SEQUENCES in names else [None] * batch.num_rows
            for labels, lengths in zip(batch.column("labels").to_pylist(), sequences, strict=True):
                firsts = list(accumulate([0, *(lengths or ())[:-1]]))
                targets += sum(x != IGNORED for x in labels) - sum(labels[first] != IGNORED for first in firsts)
    counts.tokens, counts.targets = tokens, targets if "labels" in names else None
    if counts.targets == 0:
        raise RecipeError(
            f"data: no token of {len(prepared)} rows is learnt: all labels are {IGNORED}. Correct the labels, or "
            "raise data.max_length if prompts fill the rows."
        )
    counts.notes.append(f"Tokens that {trainer} cut from documents are not counted.")
    return counts


class CountData(TrainerCallback):
    """Callback that prints the counts of each split at the start and at the end of training, by the first rank.

    Args:
        tallies: the tally of each split.
        ranks_of_group: ranks that get the same batches.
    """

    def __init__(self, tallies: dict[str, Tally], ranks_of_group: int) -> None:
        self.tallies, self.ranks_of_group = tallies, ranks_of_group
        self.lines: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print what is known before the first step."""
        self._print(state, "Data", None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print what has been counted, and keep it for the report."""
        title = f"Data after {state.global_step} steps ({state.epoch or 0:.4g} epochs)"
        self._print(state, title, self.ranks_of_group)

    def _print(self, state: Any, title: str, ranks_of_group: int | None) -> None:
        self.lines = [f"{title}, {split}: {tally.counts(ranks_of_group)}" for split, tally in self.tallies.items()]
        if state.is_world_process_zero:
            tqdm.write("\n".join(self.lines))  # beside the progress bar


def lines_of(callbacks: Sequence[TrainerCallback]) -> list[str]:
    """Return what the callback `CountData` among callbacks has printed last."""
    return next((callback.lines for callback in callbacks if isinstance(callback, CountData)), [])
