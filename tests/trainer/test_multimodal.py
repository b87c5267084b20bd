"""Training of models with images by the Trainer, on shards against the stock Trainer."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.data import IterableDataset

from tests.helpers.images import image_collator, image_model, image_samples
from tests.helpers.trainer import STOCK, check_training, make_trainer, trained


class Stream(IterableDataset):
    """Data set without a length."""

    def __init__(self, rows: list[dict]):
        self._rows = rows

    def __iter__(self):
        return iter(self._rows)


def image_history(kind, folder, model_type, options) -> tuple:
    """Train and evaluate: losses and norms of each step, all weights, the loss of the evaluation, and tokens seen."""
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "include_num_input_tokens_seen": True, **options}
    if kind == STOCK:
        options["ddp_find_unused_parameters"] = True  # as dynamic groups have it by themselves
    is_stream = options.pop("is_stream", False)
    model = image_model(model_type, None if kind == STOCK else "context_parallel")
    trainer = make_trainer(kind, folder, model=model, train_sampling_strategy="sequential", **options)
    rows = image_samples(model_type)
    trainer.train_dataset = Stream(rows) if is_stream and kind != STOCK else rows
    trainer.data_collator = image_collator
    steps, weights = trained(trainer)
    return steps, weights, trainer.evaluate(rows[:3])["eval_loss"], trainer.state.num_input_tokens_seen


DYNAMIC = {"dynamic": True, "max_tokens_per_rank": 64}
CASES = {
    "images of two sizes": (4, "qwen3_vl", {}),
    "image blocks": (2, "gemma3", {}),
    "dynamic groups": (2, "qwen3_vl", {"settings": DYNAMIC}),
    "dynamic groups of two data ranks": (4, "qwen3_vl", {"settings": DYNAMIC}),
    "dynamic groups and image blocks": (4, "gemma3", {"settings": DYNAMIC}),
    "dynamic groups, checkpointing": (4, "qwen3_vl", {"settings": DYNAMIC, "gradient_checkpointing": True}),
    "dynamic groups, bfloat16": (2, "qwen3_vl", {"settings": DYNAMIC, "bf16": True}),
    "a stream": (4, "gemma3", {"is_stream": True}),
    "checkpointing": (2, "qwen3_vl", {"gradient_checkpointing": True, "ddp_find_unused_parameters": True}),
}
"""Cases with their number of ranks. A batch has no image at all, and others have a row without one.

Accelerate cuts the batches of a stream by rows, pixels too. So the reference of a stream is a list of samples.
"""
SIMPLER = ("a stream", "checkpointing", "dynamic groups")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.exhaustive] * (case in SIMPLER)) for case in CASES]
)
def test_training_with_images_is_that_of_as_many_processes_as_groups(on_ranks, tmp_path, case):
    ranks, *run = CASES[case]
    expected = on_ranks(ranks // 2, image_history, STOCK, tmp_path, *run)[0]
    for found in on_ranks(ranks, image_history, 2, tmp_path, *run):
        check_training(found[:2], expected[:2])
        np.testing.assert_allclose(found[2:], expected[2:], rtol=1e-5)


def refused(settings: dict, folder) -> str:
    """Make a Trainer with dynamic groups whose tower is trained, and return what it raises."""
    with pytest.raises(ValueError) as caught:
        make_trainer(2, folder, model=image_model("qwen3_vl", "context_parallel"), settings=DYNAMIC, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"ddp_find_unused_parameters": False}, "wait for gradients of towers"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "does not go with reentrant",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0, where it is 0.1"),
    ],
)
def test_what_dynamic_groups_with_towers_cannot_have_is_refused(on_ranks, tmp_path, settings, said):
    assert all(said in message for message in on_ranks(2, refused, settings, tmp_path))
