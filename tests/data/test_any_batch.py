"""Property of `read_batch`: it reads what a batch says, or raises ValueError, whatever the batch is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.data.batch import IGNORED, read_batch
from tests.helpers.examples import examples

NAMES = ("input_ids", "labels", "shift_labels", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
NAMES += ("seq_idx", "token_type_ids", "inputs_embeds", "use_cache", "pixel_values", "max_length_q", "7")


@st.composite
def documents(draw: Callable) -> tuple[int, list[list[tuple[int, int]]]]:
    """Draw rows of documents that follow each other, and the length of the rows."""
    lengths = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3))
    width = max(map(sum, lengths))
    edges = [[sum(row[:n]) for n in range(len(row) + 1)] for row in lengths]
    return width, [[*zip(row, row[1:])] for row in edges]


@given(documents(), st.data())
def test_documents_are_read_as_they_were_written(drawn, data):
    width, rows = drawn
    ids = torch.arange(len(rows) * width).view(len(rows), width)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    kind = data.draw(st.sampled_from(["positions", "mask", "lengths"]))
    if kind == "mask":  # each row is one document, with padding on a side
        rows = [[(0, row[-1][1])] for row in rows]
        if data.draw(st.booleans()):
            rows = [[(width - stop, width)] for [(_, stop)] in rows]
        batch["attention_mask"] = torch.zeros_like(ids)
        for row, [(start, stop)] in enumerate(rows):
            batch["attention_mask"][row, start:stop] = 1
        batch["labels"] = ids.where(batch["attention_mask"].bool(), IGNORED)
    elif kind == "lengths":
        rows = rows[:1]
        width = rows[0][-1][1]
        edges = torch.tensor([0, *(stop for _, stop in rows[0])], dtype=torch.int32)
        batch = {name: x[:1, :width] for name, x in batch.items()} | {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    else:
        rows = [[*row, *([(row[-1][1], width)] if row[-1][1] < width else [])] for row in rows]
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(b - a) for a, b in row]) for row in rows])
    _, found, whole = read_batch(batch)
    assert [[tuple(stretch) for [stretch] in row] for row in found] == rows
    following = torch.cat([batch["labels"][:, 1:], torch.full((len(rows), 1), IGNORED)], dim=1)
    assert torch.equal(whole["shift_labels"], following)


@st.composite
def tensors(draw: Callable) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(
        st.sampled_from([torch.int64, torch.int32, torch.bool, torch.float32, torch.bfloat16, torch.complex64])
    )
    values = draw(st.sampled_from([-1, 0, 1, 2, -100, 2**31, float("nan"), float("inf"), None]))
    if values is None:
        return (torch.arange(torch.Size(shape).numel()) % draw(st.integers(1, 7))).view(shape).to(dtype)
    if values != values or values in (float("inf"), 2**31):
        dtype = torch.float32 if values != 2**31 else torch.int64
    return torch.full(shape, values).to(dtype)


VALUES = st.one_of(
    tensors(),
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=3),
)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6), st.booleans())
@examples(150)
def test_any_batch_is_read_or_refused(batch, has_ids):
    if has_ids:
        batch = {"input_ids": torch.arange(8).view(2, 4)} | batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _, rows, whole = read_batch(batch)
        except ValueError as refusal:
            assert len(str(refusal)) > 20
            return
    tokens = whole["input_ids"] if "input_ids" in whole else whole["inputs_embeds"]
    assert len(rows) == len(tokens)
    for row in rows:
        read = sorted(stretch for document in row for stretch in document)
        assert all(0 <= start < stop <= tokens.shape[1] for start, stop in read)
        assert all(before[1] <= after[0] for before, after in zip(read, read[1:])), "documents overlap"
