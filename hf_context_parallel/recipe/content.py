"""Contents of documents: what a text, a chat and a list of token ids look like."""

from __future__ import annotations

from typing import Any

from hf_context_parallel.data.batch import IGNORED
from hf_context_parallel.recipe.errors import RecipeError

COLUMNS = {"text": "text", "chat": "messages", "tokens": "input_ids"}
"""Default column of the documents, by their format."""
LABELS = "labels"
"""Column of the labels of documents of token ids."""


def check_content(content: Any, form: str, column: str, where: str) -> None:
    """Refuse the content of a document that is not of its format.

    Args:
        content: the content of the document in its column.
        form: `text`, `chat` or `tokens`.
        column: the name of the column.
        where: words that name the document.

    Raises:
        RecipeError: naming the document and the wrong value.
    """
    wrong = _fault(content, form, column == LABELS)
    if wrong is not None:
        raise RecipeError(
            f"data: {where} has {wrong} in the column {column!r}. Correct or remove it, or name another column in "
            "data.column and its format in data.format."
        )


def check_lengths(ids: list[int], labels: list[int], where: str) -> None:
    """Refuse a document with another number of labels than of token ids.

    Raises:
        RecipeError: naming the document and both numbers.
    """
    if len(ids) != len(labels):
        raise RecipeError(
            f"data: {where} has {len(ids)} input_ids and {len(labels)} labels. Give each token a label, {IGNORED} "
            "where it is not to be learnt."
        )


def _fault(content: Any, form: str, is_label: bool) -> str | None:
    """Describe what is wrong with a content, or return None."""
    if form == "text":
        return None if isinstance(content, str) else f"{with_type(content)} in place of a text"
    if not isinstance(content, list):
        return f"{with_type(content)} in place of a list of {'messages' if form == 'chat' else 'token ids'}"
    if form == "chat":
        for number, message in enumerate(content, start=1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                return f"message {number}, {with_type(message)}, without a role"
        return None
    if not set(map(type, content)) <= {int}:
        return f"{with_type(next(x for x in content if type(x) is not int))} among its integers"
    if content and not is_label and min(content) < 0:
        return f"the negative id {min(content)}"
    return None


def with_type(value: Any) -> str:
    """Write a value for an error message with its type, and a long one cut."""
    if value is None:
        return "a null"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
