"""Documents with images of a recipe: pages that it draws, and the collator of batches with images."""

from __future__ import annotations

import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from hf_context_parallel.data.batch import IGNORED
from hf_context_parallel.recipe.content import COLUMNS, check_content
from hf_context_parallel.recipe.counts import EMPTY, WORDS, Counts, Tally
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.schema import DRAWN, DataSection

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE_WIDTH, PAGE_LINES, LINE_HEIGHT, MARGIN = 384, 30, 12, 12
"""Size of a drawn page, in pixels and lines. A page is as tall as its lines."""
LINE_LENGTH = 64
"""Most characters of a line of a drawn page."""


def draw_pages(text: str) -> list[Image]:
    """Draw a text, black on white, on as many pages as it takes."""
    from PIL import Image, ImageDraw, ImageFont  # recipes without images do without Pillow

    lines = [part for line in text.expandtabs().splitlines() for part in textwrap.wrap(line, LINE_LENGTH) or [""]]
    font = ImageFont.load_default(10)
    pages = []
    for start in range(0, len(lines), PAGE_LINES):
        shown = lines[start : start + PAGE_LINES]
        page = Image.new("RGB", (PAGE_WIDTH, len(shown) * LINE_HEIGHT + 2 * MARGIN), "white")
        draw = ImageDraw.Draw(page)
        for number, line in enumerate(shown):
            draw.text((MARGIN, MARGIN + number * LINE_HEIGHT), line, fill="black", font=font)
        pages.append(page)
    return pages


def to_image_documents(
    documents: Dataset | IterableDataset, section: DataSection, tally: Tally | None = None
) -> Dataset | IterableDataset:
    """Keep the columns that the collator reads, and leave out documents without a text or a message.

    Images are drawn or read, and tokens are made, when a batch is collated: they would take many times the space.

    Args:
        tally: what counts the documents. Those of a stream are not counted before they are collated.

    Raises:
        RecipeError: if the documents lack a column, or none is left.
    """
    column = section.column or COLUMNS[section.format]
    wanted = [column] if section.images == DRAWN else [column, section.images]
    present = documents.column_names  # None for a stream, whose columns are known only after reading
    for name in wanted if present is not None else []:
        if name not in present:
            raise RecipeError(f"data: no column {name!r} in {section.path!r}. Name one of {', '.join(present)}.")
    check = partial(_has_content, form=section.format, column=column, path=section.path)
    kept = documents.select_columns(wanted).filter(check, True, input_columns=column)
    if next(iter(kept), None) is None:
        raise RecipeError(f"data: {section.path!r} has no document with a text to learn. Check data.path.")
    if tally is not None and isinstance(documents, Dataset):
        tally.known = Counts(len(documents), {WORDS[EMPTY]: len(documents) - len(kept)}, rows=len(kept))
    return kept


def _has_content(content: str | list, index: int, form: str, column: str, path: str) -> bool:
    check_content(content, form, column, f"document {index + 1} of {path!r}")
    return bool(content.strip() if isinstance(content, str) else content)


class ImageCollator:
    """Collator of documents with images: rows `[rows, longest row]`, padded on the right, and what the tower takes.

    The last message of a document is learnt. Labels of what comes before it, images included, are -100.

    Args:
        section: the section `data`.
        processor: the processor, with a chat template.
        tally: what counts documents, tokens and targets of the batches.
    """

    def __init__(self, section: DataSection, processor: ProcessorMixin, tally: Tally | None = None) -> None:
        self.section = section
        self.processor = processor
        self.tally = tally or Tally()

    def __call__(self, documents: list[dict[str, Any]]) -> dict[str, Any]:
        chats, images = zip(*map(self._chat, documents))
        prompts, answers = zip(*map(self._split, chats))
        # On the left, padding is easily taken away from the prompts again.
        encoded = self.processor(
            text=list(prompts),
            images=list(images) if any(images) else None,
            text_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
            images_kwargs=self.section.image_options,
            return_tensors="pt",
        )
        shape = encoded["input_ids"].shape
        by_token = {name: encoded.pop(name) for name in [*encoded] if encoded[name].shape == shape}
        return {**self._rows(by_token, answers), **encoded}

    def _chat(self, document: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        """Return the messages of a document, whose contents are lists of parts, and its images."""
        section = self.section
        content = document[section.column or COLUMNS[section.format]]
        images = draw_pages(content) if section.images == DRAWN else document[section.images] or []
        images = images if isinstance(images, list) else [images]
        if section.format == "text":
            content = [{"role": "user", "content": []}, {"role": "assistant", "content": content}]
        chat = [{"role": message["role"], "content": _parts(message["content"])} for message in content]
        if not any(part["type"] == "image" for message in chat for part in message["content"]):
            first = next((message for message in chat if message["role"] == "user"), chat[0])
            first["content"] = [{"type": "image"}] * len(images) + first["content"]
        return chat, images

    def _split(self, chat: list[dict[str, Any]]) -> tuple[str, str]:
        """Write a chat as text by the template, and split it before what the model is to say at its end."""
        whole = self.processor.apply_chat_template(chat, tokenize=False)
        prompt = self.processor.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        # Some templates begin an answer that is to be generated otherwise than one that is given.
        pairs = enumerate(zip(whole, prompt))
        length = next((index for index, (left, right) in pairs if left != right), min(len(whole), len(prompt)))
        return whole[:length], whole[length:]

    def _rows(self, prompts: dict[str, torch.Tensor], answers: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Join prompts, padded on the left, with answers, in rows of at most `max_length` tokens.

        Raises:
            RecipeError: if a prompt leaves no room for an answer.
        """
        tokenizer, most = self.processor.tokenizer, self.section.max_length
        rows = []
        for number, answer in enumerate(answers):
            real = prompts["attention_mask"][number].bool()
            length = int(real.sum())
            if length >= most:
                raise RecipeError(
                    f"data.max_length={most} leaves no room for an answer: the images and the prompt of a document "
                    f"take {length} tokens. Raise it, give documents fewer images, or make images smaller by "
                    "data.image_options."
                )
            tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
            ids = torch.tensor(tokens[: most - length]).long()
            lost = len(tokens) - len(ids)
            self.tally.add(documents=1, cut=lost > 0, lost=lost, tokens=length + len(ids), targets=len(ids))
            row = {name: torch.cat([value[number, real], torch.zeros_like(ids)]) for name, value in prompts.items()}
            row["input_ids"][length:] = ids
            row["attention_mask"][length:] = 1
            row["labels"] = torch.cat([torch.full((length,), IGNORED), ids])
            rows.append(row)
        fill = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED}
        return {name: pad_sequence([row[name] for row in rows], True, fill.get(name, 0)) for name in rows[0]}


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the content of a message as a list of parts, without the empty fields that tables give them."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{name: value for name, value in part.items() if value is not None} for part in content]
