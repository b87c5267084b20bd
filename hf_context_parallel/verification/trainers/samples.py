"""Tokenizer and data sets of tiny training runs, made up without any file."""

from __future__ import annotations

import random
from typing import Any

import torch.distributed as dist
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<tool>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(SPECIAL) + len(BYTES)
WORDS = ("a", "is", "the", "no", "ring", "key", "sum", "rank", "short", "token", "gather", "shard", "exact", "between")
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool>{{ call.function.name }}{% endfor %}</s>{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
"""Chat template that marks what an assistant says."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each byte, and a chat template."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL + BYTES)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<tool>"],
    )
    made.chat_template = TEMPLATE
    return made


def _text(draw: random.Random, most: int) -> str:
    """Draw up to this many words; lengths are very different."""
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))


def _turns(draw: random.Random) -> list[dict[str, Any]]:
    """Draw a conversation of several turns, some with a call of a tool."""
    turns: list[dict[str, Any]] = []
    for _ in range(draw.randint(1, 3)):
        turns.append({"role": "user", "content": _text(draw, 6)})
        if draw.random() < 0.5:
            call = {"type": "function", "function": {"name": "add", "arguments": {"x": "1"}}}
            turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
            turns.append({"role": "tool", "name": "add", "content": _text(draw, 2)})
        turns.append({"role": "assistant", "content": _text(draw, 8)})
    return turns


def make_samples(kind: str, count: int, folder: str, seed: int = 0) -> Dataset:
    """Make a data set. Every rank reads its files, since a trainer may let one rank write what the others read.

    Args:
        folder: an empty folder that all ranks see.
        kind: `text`, `chat`, `completion`, `preference`, `unpaired` or `prompt`, as TRL's documentation calls them.
        count: number of samples.
    """
    draw = random.Random(seed)

    def sample(number: int) -> dict[str, Any]:
        if kind == "text":
            return {"text": _text(draw, 20)}
        if kind == "chat":
            return {"messages": _turns(draw)}
        if kind == "prompt":
            return {"prompt": _text(draw, 5)}
        prompt, completion = _text(draw, 5), " " + _text(draw, 12)
        if kind == "completion":
            return {"prompt": prompt, "completion": completion}
        if kind == "unpaired":
            return {"prompt": prompt, "completion": completion, "label": number % 3 != 0}
        return {"prompt": prompt, "chosen": completion, "rejected": " " + _text(draw, 7)}

    path = f"{folder}/{kind}{seed}"
    made = Dataset.from_list([sample(number) for number in range(count)])
    if not dist.is_initialized() or dist.get_rank() == 0:
        made.save_to_disk(path)
    if dist.is_initialized():
        dist.barrier()
    return load_from_disk(path)
