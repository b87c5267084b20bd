"""Refusals of what the attention function of Transformers is asked for."""

from __future__ import annotations

import pytest
import torch

import hf_context_parallel as hcp
from tests.helpers.models import context, labelled, tiny_model, tokens


def test_keywords_and_masks_that_are_not_known_are_refused():
    model = hcp.parallelize(tiny_model("llama", "context_parallel"), context())
    for extra, message in (
        ({"alibi_slopes": torch.ones(4)}, "asks for alibi_slopes=Tensor"),
        ({"rescale": 30.0}, "asks for rescale=30.0"),
        ({"sliding_window": 4}, "asks for sliding_window=4 and its mask has None"),
        ({"attention_mask": torch.ones(2, 1, 20, 20)}, "given an attention mask of shape"),
        ({"attention_mask": torch.zeros(2, 20)}, "given an attention_mask"),
    ):
        with pytest.raises(ValueError, match=message), context().shard(labelled()) as local:
            model(**local | extra)


def test_lengths_that_are_not_the_plans_are_refused_with_what_would_do():
    model = hcp.parallelize(tiny_model("llama", "context_parallel"), context())
    with pytest.raises(ValueError, match="'vision_config': 'sdpa'"), context().shard(labelled()):
        model(input_ids=tokens(2, 9))
