"""Tests of positions that a model counts or is given."""

from __future__ import annotations

import pytest
import torch

from hf_context_parallel.verification.types.check import finite_masks
from hf_context_parallel.verification.types.tiny import tiny_config, tiny_model
from tests.helpers.models import context
from tests.helpers.whole_sequences import batch_of, largest_difference, loss_and_gradients


# Positions and losses that depend on more than the shard
def loss_with_offset(model_type: str) -> float:
    """Compare loss and gradients with one process for positions that do not begin at 0."""
    cp, batch = context(), batch_of(2, 37)
    batch["position_ids"] = torch.arange(50, 87).expand(2, -1).clone()
    found = loss_and_gradients(tiny_model(tiny_config(model_type), "context_parallel"), batch, cp)
    whole = tiny_model(tiny_config(model_type), None)
    with finite_masks():
        loss = whole(**batch, use_cache=False).loss
    loss.backward()
    return largest_difference(found, [loss.detach()] + [parameter.grad for parameter in whole.parameters()])


@pytest.mark.parametrize("model_type", ["llama4_text", "llama", "bloom"])
def test_positions_need_not_begin_at_0(on_ranks, model_type):
    """Llama 4 computes its temperature from the index of a token, and RoPE from its position."""
    assert max(on_ranks(2, loss_with_offset, model_type)) < 2e-6  # norms and softmax compute in float32
