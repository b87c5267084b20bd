"""Counts of documents, tokens and targets: of the cache, of streams and their workers, of images and of TRL."""

import datasets
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer

from hf_context_parallel.recipe.counts import CountData, Counts, Tally, count_prepared
from hf_context_parallel.recipe.documents import load_documents, to_rows
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.images import to_image_documents
from hf_context_parallel.recipe.schema import DataSection

TEXTS = ["abc", "a" * 20, "", "x" * 9]
"""Documents of 4, 21, 1 and 10 tokens."""


def section(**changes):
    return DataSection(**{"path": "documents", "max_length": 8, **changes})


def counted(documents, **changes):
    tally = Tally()
    rows = to_rows(documents, section(**changes), ByT5Tokenizer(), tally)
    return rows, tally


@pytest.mark.parametrize(
    ("packing", "cut", "lost", "rows", "tokens", "targets"), [(False, 2, 15, 3, 20, 17), (True, 0, 0, 5, 35, 28)]
)
def test_documents_tokens_and_targets_are_counted(packing, cut, lost, rows, tokens, targets):
    made, tally = counted(Dataset.from_dict({"text": TEXTS}), packing=packing)
    counts = tally.counts()
    assert (counts.documents, sum(counts.dropped.values()), counts.cut, counts.lost) == (4, 1, cut, lost)
    assert (counts.rows, counts.tokens, counts.targets) == (rows, tokens, targets) and len(made) == rows
    labels = [piece for row in made["labels"] for piece in (row if packing else [row])]
    assert targets == sum(len(piece) - 1 for piece in labels)
    assert made.column_names == ["input_ids", "labels"]
    text = str(counts)
    assert "4 documents read; 1 dropped, of fewer than two tokens" in text and text.startswith("Warning")
    assert ("2 cut, which lose 15 of 35 tokens (42.9%)" in text) == (not packing)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_counted_while_they_are_read(packing, workers):
    data = Dataset.from_dict({"text": TEXTS * 3})
    stream, tally = counted(data.to_iterable_dataset(num_shards=3), packing=packing)
    assert str(tally.counts()) == "a stream, counted while it is read."
    rows = list(DataLoader(stream, batch_size=None, num_workers=workers))
    counts = tally.counts()
    pieces = [piece for row in rows for piece in (row["labels"] if packing else [row["labels"]])]
    assert (counts.documents, sum(counts.dropped.values())) == (12, 3)
    assert counts.tokens == sum(map(len, pieces)) == (105 if packing else 60)
    assert counts.targets == sum(len(piece) - 1 for piece in pieces)
    assert "Read until now: " in str(counts)


def test_a_second_run_counts_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data.txt").write_text("\n".join(TEXTS))
    found = []
    for _ in range(2):
        made = section(path="text", data_files=str(tmp_path / "data.txt"))
        tally = Tally()
        rows = to_rows(load_documents(made, "train"), made, ByT5Tokenizer(), tally)
        found.append((tally.counts(), rows.cache_files))
    assert found[0] == found[1] and found[0][0].documents == 4 and found[0][0].lost == 15


def test_reasons_are_told_apart():
    data = {"input_ids": [[5, 6, 7], [8], [1, 2, 3]], "labels": [[-100, 6, 7], [8], [1, -100, -100]]}
    _, tally = counted(Dataset.from_dict(data), format="tokens")
    assert sorted(tally.counts().dropped.values()) == [0, 1, 1]
    with pytest.raises(RecipeError, match=r"2 documents read; 2 dropped, of fewer than two tokens\."):
        counted(Dataset.from_dict({"text": ["", ""]}))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("column", "form", "content", "said"),
    [
        ("text", "text", [None, "a"], "document 1 of 'documents' has a null in place of a text"),
        ("text", "text", [1, 2], r"document 1 of 'documents' has 1 \(int\) in place of a text"),
        ("input_ids", "tokens", [[1, 2], [1.5]], "among its integers"),
        ("input_ids", "tokens", [["a"]], r"has 'a' \(str\) among its integers"),
    ],
)
def test_contents_of_another_type_are_refused(column, form, content, said, stream):
    data = Dataset.from_dict({column: content})
    with pytest.raises(RecipeError, match=said):
        counted(data.to_iterable_dataset() if stream else data, format=form)


def test_documents_with_images_are_counted_when_they_are_collated():
    tally = Tally(shared=True)
    to_image_documents(Dataset.from_dict({"text": ["abc", " "]}), section(images="drawn"), tally)
    assert "2 documents read; 1 dropped, without a text or a message. An epoch has 1 rows." in str(tally.counts())
    tally.add(documents=1, cut=1, lost=3, tokens=9, targets=2)
    assert "(25.0%). An epoch has 1 rows. Read until now: 9 tokens, 2 targets." in str(tally.counts())


def test_what_a_trainer_of_trl_makes_is_counted():
    documents = Dataset.from_dict({"text": ["a", "b", "c"]})
    rows = {"input_ids": [[1, 2, 3, 4]], "labels": [[1, 2, 3, 4]], "seq_lengths": [[3, 1]]}
    counts = count_prepared(documents, Dataset.from_dict(rows), "sft")
    assert (counts.documents, counts.rows, counts.tokens, counts.targets) == (3, 1, 4, 2)
    with pytest.raises(RecipeError, match="no token of 1 rows is learnt"):
        count_prepared(documents, Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, -100]]}), "sft")
    with pytest.raises(RecipeError, match="leaves no row of 3 documents"):
        count_prepared(documents, documents.select([]), "sft")
    assert "not counted" in str(count_prepared(documents, Dataset.from_dict({"chosen": ["a"]}), "dpo"))


def test_the_first_rank_prints_counts_and_keeps_them_for_the_report(capsys):
    from transformers import TrainerState

    tally = Tally()
    tally.known = Counts(2, rows=2, tokens=10, targets=8)
    callback = CountData({"train": tally}, 1)
    state = TrainerState(global_step=3, epoch=1.5)
    callback.on_train_begin(None, state, None)
    assert "Data, train: 2 documents read. An epoch has 2 rows, 10 tokens, 8 targets." in capsys.readouterr().out
    callback.on_train_end(None, state, None)
    assert callback.lines[0].startswith("Data after 3 steps (1.5 epochs), train: 2 documents read.")
