"""Tokenizer and data sets of tiny training runs, made up without any file."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Gemma3Processor

SPECIAL = ["<pad>", "<s>", "</s>", "<tool>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(SPECIAL) + len(BYTES)
IMAGE = {"boi_token": "<image>", "image_token": "<patch>", "eoi_token": "</image>"}
"""Tokens of images by their names in the tokenizer of Gemma 3: what stands for one in a text, its tokens, its end."""
WORDS = ("a", "is", "the", "no", "ring", "key", "sum", "rank", "short", "token", "gather", "shard", "exact", "between")
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool>{{ call.function.name }}{% endfor %}</s>{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
"""Chat template that marks what an assistant says."""
IMAGE_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: "
    "{% for part in message.content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
"""Chat template of messages with images."""


def make_tokenizer(**more: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each byte, and a chat template.

    Args:
        more: further special tokens, by the names that the tokenizer has them under.
    """
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
        model_specific_special_tokens=more,
    )
    made.add_tokens(list(more.values()), special_tokens=True)
    made.chat_template = TEMPLATE
    return made


def make_processor(config: PreTrainedConfig) -> Gemma3Processor:
    """Make a processor of text and images for a model of Gemma 3, in whose configuration the ids of images are set."""
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor  # which need Pillow

    tokenizer = make_tokenizer(**IMAGE)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in IMAGE.values()]
    config.boi_token_index, config.image_token_index, config.eoi_token_index = ids
    side = config.vision_config.image_size
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    count = config.mm_tokens_per_image
    return Gemma3Processor(images, tokenizer, chat_template=IMAGE_TEMPLATE, image_seq_length=count)


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


def _image(draw: random.Random) -> Image:
    """Draw an image of random colours."""
    from PIL import Image  # runs without images do without Pillow

    colours = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(colours)


def _turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def make_samples(kind: str, count: int, folder: str, seed: int = 0) -> Dataset:
    """Make a data set. Every rank reads its files, since a trainer may let one rank write what the others read.

    Args:
        folder: an empty folder that all ranks see.
        kind: `text`, `chat`, `completion`, `preference`, `unpaired` or `prompt`, as TRL's documentation calls them;
            `chat, images` or `preference, images`, of which the third sample and each third one after it has none.
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
        if kind.endswith("images"):
            question, answer = _turn("user", prompt), _turn("assistant", completion)
            images = [_image(draw) for _ in range((1, 2, 0)[number % 3])]
            if kind.startswith("chat"):
                return {"images": images, "messages": question + answer}
            other = _turn("assistant", _text(draw, 7))
            return {"images": images, "prompt": question, "chosen": answer, "rejected": other}
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
