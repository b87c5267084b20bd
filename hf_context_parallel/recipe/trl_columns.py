"""Columns of the data of TRL's trainers: which they need, and what their documents look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_context_parallel.recipe.content import LABELS, check_content, check_lengths
from hf_context_parallel.recipe.errors import RecipeError

TEXT = "text"
"""Column of the texts of `sft`. `training.dataset_text_field` names another."""
ONE_OF = {
    "sft": ("messages", "conversations", "prompt", "input_ids"),
    "dpo": ("chosen",),
    "orpo": ("chosen",),
    "cpo": ("chosen",),
    "reward": ("chosen", "chosen_input_ids", "chosen_ids"),
    "kto": ("completion", "chosen"),
    "grpo": ("prompt",),
    "rloo": ("prompt",),
}
"""Columns of which the data of a trainer have at least one, beside the texts of `sft`."""
EITHER = ("prompt", "completion", "chosen", "rejected")
"""Columns that hold a text or a chat."""
TOKENS = ("input_ids", "chosen_input_ids", "rejected_input_ids", "chosen_ids", "rejected_ids")
"""Columns that hold token ids."""


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
    def one_of(self) -> tuple[str, ...]:
        """The columns of which the data have at least one."""
        return (*ONE_OF[self.trainer], *([self.text] if self.trainer == "sft" else []))

    def check_names(self, names: list[str], where: str) -> None:
        """Refuse columns of which the trainer can read none.

        Raises:
            RecipeError: naming the file or the line, its columns, and those that are needed.
        """
        if not {*self.one_of} & {*names}:
            raise RecipeError(
                f"data: {where} has the columns {', '.join(names)}, and trainer={self.trainer!r} needs "
                f"{' or '.join(self.one_of)}. Rename a column."
            )

    def check_document(self, document: Mapping[str, Any], where: str) -> None:
        """Refuse a document that the trainer cannot read. Columns that hold a null are taken for absent.

        Raises:
            RecipeError: naming the document and the wrong value.
        """
        given = {name: value for name, value in document.items() if value is not None}
        if not {*self.one_of} & {*given}:
            self.check_names([*document], where)
            name = next(name for name in self.one_of if name in document)
            raise RecipeError(f"data: {where} has a null in the column {name!r}. Correct or remove it.")
        for name, value in given.items():
            if name == self.text and self.trainer == "sft":
                check_content(value, "text", name, where)
            elif name in TOKENS:
                check_content(value, "tokens", name, where)
            elif name == "messages" or name in EITHER:
                chat = name == "messages" or isinstance(value, list)
                check_content(value, "chat" if chat else "text", name, where)
        ids, labels = given.get("input_ids"), given.get(LABELS)
        if self.trainer == "sft" and ids is not None and labels is not None:
            check_content(labels, "tokens", LABELS, where)
            check_lengths(ids, labels, where)
