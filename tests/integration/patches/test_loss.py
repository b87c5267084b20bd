"""Tests of losses that are put right on a shard."""

from __future__ import annotations

import pytest

from hf_context_parallel.verification.types.tiny import tiny_config, tiny_model
from tests.helpers.models import context
from tests.helpers.whole_sequences import batch_of


def refusal_without_a_dictionary(model_type: str) -> str:
    model = tiny_model(tiny_config(model_type), "context_parallel")
    with (
        pytest.raises(ValueError) as refusal,
        context().shard({**batch_of(2, 24), "return_dict": False}, model) as local,
    ):
        model(**local)
    return str(refusal.value)


@pytest.mark.parametrize("model_type", ["bart", "xlnet"])
def test_a_loss_that_is_put_right_needs_a_dictionary(on_ranks, model_type):
    for told in on_ranks(2, refusal_without_a_dictionary, model_type):
        assert f"return_dict=False: the loss of a {model_type} is a mean over its shard" in told
