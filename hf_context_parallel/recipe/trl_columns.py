"""Columns of the data of TRL's trainers: which they need, and what their documents look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_context_parallel.recipe.content import LABELS, check_content, check_lengths
from hf_context_parallel.recipe.errors import RecipeError

TEXT = "text"
"""Column of the texts of `sft`. `training.dataset_text_field` names another."""
PAIRS = ("prompt", "chosen", "rejected")
READ = {
    "dpo": PAIRS,
    "orpo": PAIRS,
    "cpo": PAIRS,
    "reward": (*PAIRS, "chosen_input_ids", "rejected_input_ids", "chosen_ids", "rejected_ids"),
    "kto": (*PAIRS, "completion"),
    "grpo": ("prompt",),
    "rloo": ("prompt",),
}
"""Columns that trainers read."""
NEEDED = {
    "dpo": ("chosen",),
    "orpo": ("chosen",),
    "cpo": ("chosen",),
    "reward": ("chosen", "chosen_input_ids", "chosen_ids"),
    "kto": ("completion", "chosen"),
    "grpo": ("prompt",),
    "rloo": ("prompt",),
}
"""Columns of which the data have at least one."""
OF_SFT = (("input_ids", LABELS), ("prompt", "completion"), ("messages",), ("conversations",))
"""Columns that `sft` reads in place of a text: the first of these of which a document has the first column."""


@dataclass(frozen=True)
class TrlColumns:
    """Columns that a trainer of TRL reads.

    Args:
        trainer: the name of the trainer in a recipe.
        text: the column of the texts of `sft`.
    """

    trainer: str
    text: str = TEXT

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns of which the data have at least one."""
        if self.trainer == "sft":
            return ("messages", "conversations", self.text, "prompt", "input_ids")
        return NEEDED[self.trainer]

    def read_of(self, document: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the columns that the trainer reads of a document."""
        if self.trainer == "sft":
            return next((columns for columns in OF_SFT if columns[0] in document), (self.text,))
        return READ[self.trainer]

    def check_names(self, names: list[str], where: str) -> None:
        """Refuse columns of which the trainer can read none.

        Raises:
            RecipeError: naming the file or the line, its columns, and those that are needed.
        """
        if not {*self.needed} & {*names}:
            raise RecipeError(
                f"data: {where} has the columns {', '.join(names)}, and trainer={self.trainer!r} needs "
                f"{' or '.join(self.needed)}. Rename a column."
            )

    def check_document(self, document: Mapping[str, Any], where: str) -> None:
        """Refuse a document that the trainer cannot read. Columns that hold a null are taken for absent.

        Raises:
            RecipeError: naming the document and the wrong value.
        """
        given = {name: value for name, value in document.items() if value is not None}
        if not {*self.needed} & {*given}:
            self.check_names([*document], where)
            name = next(name for name in self.needed if name in document)
            raise RecipeError(f"data: {where} has a null in the column {name!r}. Correct or remove it.")
        read = self.read_of(given)
        for name in read:
            if name in given and name != "conversations":  # which have keys of their own
                check_content(given[name], self._form(name, given[name]), name, where)
        if {"input_ids", LABELS} <= {*read} & {*given}:
            check_lengths(given["input_ids"], given[LABELS], where)

    def _form(self, column: str, content: Any) -> str:
        """Return the format that a column has: a text or a chat where it may be either."""
        if column.endswith("_ids") or column == LABELS:
            return "tokens"
        if column == "messages" or (isinstance(content, list) and (self.trainer != "sft" or column != self.text)):
            return "chat"
        return "text"
