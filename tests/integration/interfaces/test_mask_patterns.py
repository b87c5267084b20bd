"""Patterns read from the mask functions of Transformers, against the mask tensors that it makes of them."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import AutoConfig, masking_utils
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.gemma3.modeling_gemma3 import _bidirectional_window_overlay

from hf_context_parallel.integration.interfaces.mask_patterns import read_pattern
from hf_context_parallel.planning.mask import Mask, Pattern, from_attention_mask, from_position_ids
from tests.helpers.models import document_positions, labelled, loss_in, needs_chunks_of_documents, tiny_model
from tests.helpers.simulated import allowed

LENGTH = 24
IDS = torch.full((2, LENGTH), -1)
"""Number of the block of each token: two blocks of images in the first row, and one of two parts in the second."""
IDS[0, 3:9], IDS[0, 12:20], IDS[1, :4], IDS[1, 10:15] = 0, 1, 0, 0
BLOCKS = ((((3, 9),), ((12, 20),)), (((0, 4), (10, 15)),))
KINDS = {
    "causal": ("create_causal_mask", {}, Pattern()),
    "bidirectional": ("create_bidirectional_mask", {}, Pattern(causal=False)),
    "window": ("create_sliding_window_causal_mask", {}, Pattern(sliding_window=5)),
    "bidirectional window, as ModernBERT's": (
        "create_bidirectional_sliding_window_mask",
        {},
        Pattern(causal=False, sliding_window=6),
    ),
    "bidirectional window, as Gemma 3's": (
        "create_sliding_window_causal_mask",
        {"or_mask_function": _bidirectional_window_overlay(5)},
        Pattern(causal=False, sliding_window=5),
    ),
    "all, as Gemma 3's": (
        "create_causal_mask",
        {"or_mask_function": lambda *args: torch.tensor(True)},
        Pattern(causal=False),
    ),
    "chunks": ("create_chunked_causal_mask", {}, Pattern(chunk_size=7)),
    "images": ("create_causal_mask", {"block_sequence_ids": IDS}, Pattern(blocks=BLOCKS)),
    "images and a window": (
        "create_sliding_window_causal_mask",
        {"block_sequence_ids": IDS},
        Pattern(sliding_window=5, blocks=BLOCKS),
    ),
    "images in a window, as Gemma 3's": (
        "create_causal_mask",
        {
            "or_mask_function": masking_utils.blockwise_overlay(IDS),
            "and_mask_function": masking_utils.sliding_window_overlay(5),
        },
        Pattern(sliding_window=5, blocks=BLOCKS, blocks_in_window=True),
    ),
    "no image": ("create_causal_mask", {"block_sequence_ids": torch.full((2, LENGTH), -1)}, Pattern()),
}
PACKED = torch.cat([torch.arange(n) for n in (9, 1, 14)])[None].expand(2, -1)


def masks_of(kind: str, whole: bool = True, **batch) -> tuple[torch.Tensor, Pattern]:
    """Return the mask tensor of Transformers, and the pattern that is read from its mask function."""
    name, arguments, _ = KINDS[kind]
    described = []

    def listen(*args, **kwargs):
        described.append(read_pattern(kwargs["mask_function"], "a model", whole=whole))
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("allow_")}
        return sdpa_mask(*args, **kwargs, allow_is_causal_skip=False)

    AttentionMaskInterface.register("listening", listen)
    config = AutoConfig.for_model("llama", sliding_window=5, attention_chunk_size=7)
    config._attn_implementation = "listening"
    function = getattr(masking_utils, name)
    cache = "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"  # before 5.24
    taken = {"attention_mask": None, cache: None, **batch, **arguments}
    if "bidirectional" in name:  # which looks at no positions, and documents are in the plan
        taken.pop("position_ids", None)
    made = function(config=config, inputs_embeds=torch.zeros(2, LENGTH, 4), **taken)
    return made[:, 0], described[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_masked_as_transformers_does(kind):
    made, pattern = masks_of(kind)
    assert pattern == KINDS[kind][2]
    assert made.equal(allowed(Mask(LENGTH, ((((0, LENGTH),),),) * 2, pattern)))


@pytest.mark.parametrize(
    "kind",
    ["causal", "window", "images", "images and a window", pytest.param("chunks", marks=needs_chunks_of_documents)],
)
def test_packed_documents_are_masked_as_transformers_does(kind):
    made, pattern = masks_of(kind, position_ids=PACKED)
    assert made.equal(allowed(Mask(LENGTH, from_position_ids(PACKED), pattern)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_masked_as_transformers_does(kind, side):
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[0, :10] = 0
    padding = padding if side == "left" else padding.flip(1)
    made, pattern = masks_of(kind, attention_mask=padding)
    real = padding.bool()
    seen = allowed(Mask(LENGTH, from_attention_mask(padding), pattern))
    assert made[real].equal(seen[real])  # what padding reads does not matter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"and_mask_function": lambda batch, head, query, key: query > key}, "masks attention by '<lambda>'"),
        ({"or_mask_function": lambda batch, head, query, key: key < 3}, "masks attention by '<lambda>'"),
        ({"block_sequence_ids": torch.zeros(2, LENGTH, dtype=torch.long)}, "masks attention by 'blockwise_overlay"),
    ],
)
def test_a_mask_that_is_not_known_is_refused_by_name(arguments, message, monkeypatch):
    monkeypatch.setitem(KINDS, "other", ("create_causal_mask", arguments, None))
    with pytest.raises(ValueError, match=message):
        masks_of("other", whole=False)


def test_limits_of_blocks_that_are_not_known_are_refused(monkeypatch):
    arguments = {
        "or_mask_function": masking_utils.blockwise_overlay(IDS),
        "and_mask_function": masking_utils.causal_mask_function,
    }
    monkeypatch.setitem(KINDS, "other", ("create_causal_mask", arguments, None))
    with pytest.raises(ValueError, match="limits blocks of tokens by 'causal_mask_function'"):
        masks_of("other")


@needs_chunks_of_documents
def test_chunks_that_begin_inside_of_one_are_refused():
    model = tiny_model("llama4_text", "context_parallel")
    size = model.config.attention_chunk_size
    whole = document_positions(10, 9)
    for begin in (size, 0):
        loss_in({**labelled(1), "position_ids": torch.cat([whole[:, :10] + begin, whole[:, 10:]], dim=1)}, model)
    with pytest.raises(ValueError, match=f"chunks of {size} positions, and a packed document begins"):
        loss_in({**labelled(1), "position_ids": torch.cat([whole[:, :10] + 1, whole[:, 10:]], dim=1)}, model)
