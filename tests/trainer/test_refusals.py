"""Tests of what the Trainer refuses before training."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.models import tiny_model
from tests.helpers.trainer import make_trainer

REFUSED = {
    "attn_implementation='context_parallel'": lambda: {"model": tiny_model("llama", "sdpa", torch.float32)},
    "eval_use_gather_object=True": lambda: {"eval_use_gather_object": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_exact_is_refused_before_training(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(1, tmp_path, **REFUSED[message]())
