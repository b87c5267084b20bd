"""Warning of placeholders of media in batches that have no media."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch

import hf_context_parallel as hcp
from hf_context_parallel.integration.checks import media
from hf_context_parallel.verification.types.check import unrounded
from hf_context_parallel.verification.types.media import auto_class
from hf_context_parallel.verification.types.tiny import tiny_config, tiny_model
from tests.helpers.images import MARKS, image_collator, image_model, image_samples
from tests.helpers.models import context

IMAGE = MARKS["qwen3_vl"][1]
PIXELS = {"pixel_values": torch.ones(1)}


def told(model_type: str, caplog, **given: Any) -> str:
    """Return the warning for a batch."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    media.warn_of_missing_media(model, inspect.signature(model.forward).parameters, given)
    return caplog.text


def test_placeholders_without_pixels_are_counted(caplog):
    ids = torch.tensor([[3, IMAGE, IMAGE, 4], [5, IMAGE, 6, 7]])
    text = told("qwen3_vl", caplog, input_ids=ids)
    assert "3 placeholders of images (token 48) and no pixel_values, so" in text
    assert "remove_unused_columns=False" in text


@pytest.mark.parametrize(
    ("model_type", "field", "media_of_batch", "expected"),
    [
        ("qwen3_vl", "video_token_id", PIXELS, "of videos (token 49) and no pixel_values_videos"),
        ("glmasr", "audio_token_id", {}, "of audio (token 48) and no input_features"),
        ("molmo2", "image_patch_id", {}, "of images (token 51) and no pixel_values"),
        ("paddleocr_vl", "video_token_id", {}, "of videos (token 49) and no pixel_values"),
        ("qwen3_vl", "image_token_id", PIXELS, ""),
        ("glm4v", "image_token_id", {"pixel_values_videos": torch.ones(1)}, ""),  # of the frames of a video
        ("fuyu", "image_token_id", {"image_patches": torch.ones(1)}, ""),
    ],
)
def test_each_kind_of_media_has_its_argument(caplog, model_type, field, media_of_batch, expected):
    ids = torch.tensor([[3, getattr(tiny_config(model_type), field), 5]])
    text = told(model_type, caplog, input_ids=ids, **media_of_batch)
    assert expected in text and bool(text) == bool(expected)


def test_padding_is_no_placeholder(caplog):
    ids = torch.tensor([[3, 4, IMAGE]])
    assert not told("qwen3_vl", caplog, input_ids=ids, attention_mask=torch.tensor([[1, 1, 0]]))
    config = tiny_config("qwen3_vl")
    config.text_config.pad_token_id = IMAGE
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    media.warn_of_missing_media(model, inspect.signature(model.forward).parameters, {"input_ids": ids})
    assert not caplog.text


def test_text_and_embeddings_are_left_alone(caplog):
    assert not told("qwen3_vl", caplog, input_ids=torch.arange(3, 9)[None])
    assert not told("qwen3_vl", caplog, inputs_embeds=torch.ones(1, 2, 4))
    model = tiny_model(tiny_config("llama"), None)
    media.warn_of_missing_media(model, inspect.signature(model.forward).parameters, {"input_ids": torch.ones(1, 2)})
    assert not caplog.text


class Records(logging.Handler):
    """Handler that keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def warnings_of_calls() -> tuple[list[str], list[str]]:
    """Return the warnings of calls with pixels, whole batches and generation, and those of two without pixels."""
    records = Records()
    media.logger.addHandler(records)
    cp = context()
    model = hcp.parallelize(image_model("qwen3_vl", "context_parallel"), cp)
    batch = image_collator(image_samples("qwen3_vl", [(0,), (0,)]))
    without = {name: x for name, x in batch.items() if name not in ("pixel_values", "image_grid_thw")}
    with unrounded(model.config):
        model(**batch)
        with cp.whole(model):
            model(**without)
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        model.eval().generate(**inputs, max_new_tokens=3, do_sample=False)
        before, records.texts = records.texts, []
        model(**without)
        model(**without)
    media.logger.removeHandler(records)
    return before, records.texts


def test_the_first_rank_warns_once_of_a_model(on_ranks):
    (before, found), (_, other) = on_ranks(2, warnings_of_calls)
    assert not before and not other
    assert len(found) == 1 and "Qwen3VLForConditionalGeneration was given 8 placeholders of images" in found[0]
