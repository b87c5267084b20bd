"""Processors that need torchvision, such as that of Qwen3-VL with its videos, in trainers of TRL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, ProcessorMixin

pytest.importorskip("trl", reason="TRL needs Python 3.11")

import hf_context_parallel as hcp
from hf_context_parallel.verification.trainers import compare, run
from hf_context_parallel.verification.trainers.cases import PLAIN, Case
from hf_context_parallel.verification.trainers.samples import IMAGE_TEMPLATE, make_tokenizer
from hf_context_parallel.verification.types.check import unrounded
from hf_context_parallel.verification.types.tiny import tiny_model
from tests.helpers.border import mean_gradients
from tests.helpers.models import context, error, some_labels

TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
CASES = {
    "SFT": Case("SFTTrainer", "chat, images", "qwen3_vl", vision=True, options=PLAIN),
    "DPO": Case("DPOTrainer", "preference, images", "qwen3_vl", vision=True),
}


def make_processor(config: PreTrainedConfig) -> ProcessorMixin:
    """Make the processor of Qwen3-VL, and set the ids of its tokens in a configuration."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = make_tokenizer(**TOKENS)
    for name, token in TOKENS.items():
        setattr(config, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    vision = config.vision_config
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "size": {"shortest_edge": 1, "longest_edge": 10**6},
    }
    images, videos = Qwen2VLImageProcessor(**sizes), Qwen3VLVideoProcessor(**sizes)
    template = IMAGE_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    return Qwen3VLProcessor(images, tokenizer, videos, chat_template=template)


@contextmanager
def processor_of_qwen() -> Iterator[None]:
    """Give runs the processor of Qwen3-VL in this block."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "make_processor", make_processor)
        patched.setattr(run, "IMAGE", TOKENS)
        yield


def run_with_torchvision(case: Case, *args: Any) -> run.Result:
    """Run a case with the processor of Qwen3-VL."""
    with processor_of_qwen():
        return run.run(case, *args)


@pytest.fixture(autouse=True)
def torchvision() -> None:
    pytest.importorskip("torchvision", reason="the processor of Qwen3-VL needs torchvision: `pip install torchvision`")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_images_of_qwens_processor_train_as_on_one_process(on_ranks, monkeypatch, name):
    monkeypatch.setattr(compare, "run", run_with_torchvision)
    finding = compare.compare(name, CASES[name], on_ranks)
    assert finding.state == "exact", finding
    print(finding)


def errors_with_a_video() -> tuple[float, float, list[int]]:
    """Compute a batch of the processor with images and a video on all ranks, and on one process.

    Returns:
        The errors of the loss and of the gradients, and the numbers of grids of images and of videos.
    """
    with processor_of_qwen():
        config = run.model_config(CASES["SFT"])
        processor = run.processing_class(CASES["SFT"])
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (height, 70, 3), dtype=np.uint8) for height in (40, 130)]
    frames = random.integers(0, 256, (6, 64, 100, 3), dtype=np.uint8)
    image, video = (f"<|vision_start|>{TOKENS[name]}<|vision_end|>" for name in ("image_token", "video_token"))
    texts = [f"first {image} and {image}, then {video} in the end", "no image is here"]
    batch = processor(text=texts, images=images, videos=[frames], padding=True, return_tensors="pt")
    labels = some_labels(batch["input_ids"])
    batch = {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}
    whole, sharded = (
        tiny_model(config, name, torch.float64, auto=AutoModelForImageTextToText).train()
        for name in (None, "context_parallel")
    )
    hcp.parallelize(sharded, context())
    with unrounded(config):
        expected, found = whole(**batch, use_cache=False).loss, sharded(**batch).loss
        expected.backward()
        found.backward()
    pairs = zip(mean_gradients(sharded), (parameter.grad for parameter in whole.parameters()))
    worst = max(error(mine, theirs) for mine, theirs in pairs if theirs is not None)
    grids = [len(batch[name]) for name in ("image_grid_thw", "video_grid_thw")]
    return error(found, expected), worst, grids


@pytest.mark.exhaustive
def test_images_and_a_video_of_qwens_processor(on_ranks):
    for loss, gradients, grids in on_ranks(2, errors_with_a_video):
        assert loss < 1e-12 and gradients < 1e-8 and grids == [2, 1]
