"""Check of types that take images, video and sound, and the batches that it makes."""

from __future__ import annotations

import json

import pytest
import torch

from hf_context_parallel.compat import pillow_processor
from hf_context_parallel.data.batch import IGNORED
from hf_context_parallel.integration.model_registry import KNOWN_MULTIMODAL
from hf_context_parallel.verification.types import check, media, survey
from hf_context_parallel.verification.types.processors import processed
from hf_context_parallel.verification.types.tiny import tiny_config
from tests.helpers.models import needs_the_tables_version

SAMPLE = {
    "llava": (3,),  # images of one size
    "qwen2_vl": (2,),  # three axes of positions, video
    "glmasr": (2,),  # sound
    "mistral3": (4,),  # images of several sizes
    "gemma3": (2,),  # image blocks
    "qwen3_vl": (3,),  # DeepStack
    "idefics3": (2,),  # images listed by rows
    "florence2": (2,),  # an encoder and a decoder
    "qwen3_vl_moe": (2,),  # auxiliary loss of the router
    "qwen2_5_omni_thinker": (2,),  # features under two names
    "glm5_next": (3,),  # the same, of a decoder that sees whole sequences
}
"""Types of several families, and the sizes of the CP groups that they are checked on."""
SELDOM = SAMPLE.keys() - {"llava", "qwen2_vl", "glmasr"}


@needs_the_tables_version
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in SELDOM)) for name in SAMPLE]
)
def test_what_is_known_of_a_type_with_media_is_so(on_ranks, model_type):
    found = survey.examine(on_ranks, model_type, SAMPLE[model_type], {}, media=True)
    known = json.loads(KNOWN_MULTIMODAL.read_text())["types"][model_type]
    assert (found.state, found.handled) == (known["state"], known["handled"]), found.reason
    assert found.by_processor == known.get("by_processor", False)


def batches_of(model_type: str) -> dict[str, media.Batch]:
    return check.Case(tiny_config(model_type), media=True).batches()


def test_batches_have_several_images_of_two_sizes_and_a_row_without_any():
    batches = batches_of("qwen2_vl")
    assert list(batches) == ["images", "video", "text", "padded left", "padded right", "packed"]
    inputs = batches["images"].inputs
    grids = inputs["image_grid_thw"]
    assert len(grids) == 3 and len(grids.unique(dim=0)) == 2
    placeholders = (inputs["mm_token_type_ids"] == 1).sum(1)
    assert placeholders.tolist() == [20, 8, 0] and sum(grids.prod(1).tolist()) // 4 == 28
    assert len(inputs["pixel_values"]) == grids.prod(1).sum()
    assert (inputs["labels"][inputs["mm_token_type_ids"] > 0] == IGNORED).all()  # nothing is learned of images


def test_images_are_made_by_the_processor_of_a_type():
    pixels = batches_of("qwen2_vl")["images"].inputs["pixel_values"]
    assert pixels.dtype == torch.float64 and 1.5 < pixels.abs().max() < 3  # bytes in the range of normalised colours
    assert batches_of("qwen2_vl")["images"].by_processor and not batches_of("glmasr")["audio"].by_processor


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen2_vl", "Qwen2VLImageProcessorPil"),
        ("qwen3_vl_moe", "Qwen2VLImageProcessorPil"),  # has that of Qwen3-VL
        ("qwen3_omni_moe_thinker", "Qwen2VLImageProcessorPil"),  # has that of the whole model
        ("mistral3", "PixtralImageProcessorPil"),
    ],
)
def test_types_without_a_processor_of_images_have_that_of_another(model_type, name):
    assert pillow_processor(tiny_config(model_type)).__name__ == name


def test_tensors_take_the_place_of_a_processor_that_needs_torchvision_or_other_sizes():
    made = {"pixel_values": torch.ones(1, 3, 56, 56)}
    for model_type in ("molmo2", "aria"):
        assert processed(tiny_config(model_type), 0, made) is None
    assert processed(tiny_config("llava"), 0, made)["pixel_values"].shape == (1, 3, 56, 56)


def test_documents_of_a_packed_batch_have_positions_of_their_own():
    batch = batches_of("qwen2_vl")["packed"]
    positions = batch.inputs["position_ids"]
    lengths = [part["input_ids"].shape[1] for part in batch.parts]
    assert positions.shape == (4, 1, sum(lengths))
    assert positions[0, 0].tolist() == [place for length in lengths for place in range(length)]
    assert not torch.equal(positions[0], positions[2])  # rows of an image have the same place in time
    assert torch.equal(torch.cat([part["input_ids"] for part in batch.parts], 1), batch.inputs["input_ids"])


def test_the_auxiliary_loss_of_a_router_is_compared_beside_images_and_padding():
    batch = batches_of("qwen3_vl_moe")[media.AUXILIARY]
    assert {"pixel_values", "attention_mask"} <= batch.inputs.keys() and not batch.inputs["attention_mask"].all()
    case = check.Case(tiny_config("qwen3_vl_moe"), media=True)
    plain, with_router = (check._reference(case, kind)[0] for kind in ("padded left", media.AUXILIARY))
    assert with_router > plain


def test_types_that_cannot_be_tested_are_refused_without_a_run():
    found = survey.examine(None, "perception_lm", [2], {}, media=True)
    assert found.state == "refused" and "timm" in found.reason
