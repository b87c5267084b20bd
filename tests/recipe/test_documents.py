"""Tests of the rows that recipes make of documents."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from hf_context_parallel.recipe.documents import load_documents, make_collator, pack, to_rows
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.model import load_tokenizer
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.recipe.schema import DataSection
from tests.helpers.recipe import RECIPES


def section(**changes):
    return DataSection(**{"path": "documents", "max_length": 8, **changes})


def test_the_demo_reads_long_documents():
    recipe = load_recipe(RECIPES / "demo_cpu.yaml")
    rows = to_rows(load_documents(recipe.data, "train"), recipe.data, load_tokenizer(recipe.model))
    assert len(rows) >= recipe.training.max_steps
    assert {len(row) for row in rows["input_ids"]} == {16384}


def test_text_rows_are_cut_and_padded():
    tokenizer = ByT5Tokenizer()
    settings = section()
    rows = to_rows(Dataset.from_dict({"text": ["abc", "a" * 20, ""]}), settings, tokenizer)
    assert rows["input_ids"] == [[*tokenizer("abc")["input_ids"]], [100] * 8]
    assert rows["input_ids"][0][-1] == tokenizer.eos_token_id
    batch = make_collator(settings, tokenizer)([rows[0], rows[1]])
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)


def test_chat_rows_follow_the_template():
    tokenizer = ByT5Tokenizer(chat_template="{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    chats = Dataset.from_dict({"messages": [[{"role": "a", "content": "b"}, {"role": "c", "content": "d"}]]})
    rows = to_rows(chats, section(format="chat", max_length=100), tokenizer)
    assert tokenizer.decode(rows[0]["input_ids"]) == "a=b;c=d;"
    with pytest.raises(RecipeError, match="chat template"):
        to_rows(chats, section(format="chat"), ByT5Tokenizer())


def test_token_rows_keep_labels_of_their_own():
    data = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [8, 9]]})
    settings = section(format="tokens", packing=True)
    batch = make_collator(settings, None)(list(to_rows(data, settings, ByT5Tokenizer())))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert "attention_mask" not in batch


def test_streams_become_rows():
    stream = Dataset.from_dict({"text": ["abc", "defgh"], "other": [1, 2]}).to_iterable_dataset()
    rows = list(to_rows(stream, section(packing=True), ByT5Tokenizer()))
    assert [[len(document) for document in row["input_ids"]] for row in rows] == [[4, 4], [2]]


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"no file matches '.*nothing\.txt'"):
        load_documents(section(path="text", data_files=str(tmp_path / "nothing.txt")), "train")
    with pytest.raises(RecipeError, match=r"no column 'text'.*body"):
        to_rows(Dataset.from_dict({"body": ["abc"]}), section(), ByT5Tokenizer())
    with pytest.raises(RecipeError, match="no document with a token to predict: of two tokens"):
        to_rows(Dataset.from_dict({"text": ["", ""]}), section(), ByT5Tokenizer())


NOTHING_TO_PREDICT = {
    "one token": {"input_ids": [[5], [6]]},
    "no label": {"input_ids": [[5, 6, 7]], "labels": [[5, -100, -100]]},
    "labels behind the cut": {"input_ids": [list(range(10))], "labels": [[-100] * 8 + [8, 9]]},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", NOTHING_TO_PREDICT)
def test_data_without_a_token_to_predict_is_refused(case, stream):
    data = Dataset.from_dict(NOTHING_TO_PREDICT[case])
    data = data.to_iterable_dataset() if stream else data
    with pytest.raises(RecipeError, match=r"no document with a token to predict.*data.max_length"):
        to_rows(data, section(format="tokens"), ByT5Tokenizer())


def test_labels_of_other_lengths_are_refused():
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[6, 7]]})
    with pytest.raises(RecipeError, match="3 input_ids and 2 labels"):
        to_rows(data, section(format="tokens"), ByT5Tokenizer())


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 16))
def test_packing_keeps_every_token_in_order(lengths, max_length):
    documents = [[1000 * index + position for position in range(length)] for index, length in enumerate(lengths)]
    packed = pack({"input_ids": documents, "labels": documents}, max_length)
    assert packed["input_ids"] == packed["labels"]
    rows = packed["input_ids"]
    assert [token for row in rows for piece in row for token in piece] == [
        t for document in documents for t in document
    ]
    sizes = [sum(map(len, row)) for row in rows]
    assert all(size == max_length for size in sizes[:-1]) and all(0 < size <= max_length for size in sizes[-1:])
    # A piece belongs to one document, and documents are cut at the ends of rows only.
    assert all(piece == list(range(piece[0], piece[0] + len(piece))) for row in rows for piece in row)
    assert sum(map(len, rows)) <= len(documents) + max(len(rows) - 1, 0)
