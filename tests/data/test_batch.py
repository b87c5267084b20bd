"""Refusals of batches that cannot be read, or that no shard can be exact for."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.models import (
    context,
    document_positions,
    error,
    label_at_padding,
    labelled,
    reduced,
    tiny_model,
    tokens,
)


def cu_seqlens_errors() -> float:
    """Compare documents given by cumulative lengths, with and without positions, with documents given by positions."""
    cp, lengths = context(), (5, 1, 8)
    batch = labelled(1, sum(lengths))
    model = tiny_model("gpt2", "context_parallel")
    cumulative = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    positions = document_positions(*lengths)
    flat = {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative, "max_length_q": 8, "max_length_k": 8}
    losses = []
    for documents in ({"position_ids": positions}, {"position_ids": positions, **flat}, flat):
        with cp.shard({**batch, **documents}, model) as local:
            losses.append(reduced(model(**local).loss))
    return max(error(losses[0], other) for other in losses[1:])


def test_documents_may_be_given_by_cumulative_lengths(on_ranks):
    assert on_ranks(2, cu_seqlens_errors) == [0.0, 0.0]


def packed_and_masked() -> dict:
    return {**labelled(1, 8), "position_ids": document_positions(3, 5), "attention_mask": torch.ones(1, 8)}


REFUSED = {
    "use_cache=True": lambda: {**labelled(), "use_cache": True},
    "both an attention_mask and position_ids": packed_and_masked,
    "both an attention_mask and cu_seq_lens_q": lambda: {
        **labelled(1, 8),
        "cu_seq_lens_q": torch.tensor([0, 8]),
        "attention_mask": torch.ones(1, 8),
    },
    "predicted from padding": label_at_padding,
    "only a 2-D padding mask": lambda: {**labelled(), "attention_mask": torch.ones(2, 1, 19, 19)},
    "'pixel_values'": lambda: {**labelled(), "pixel_values": torch.zeros(1)},
    "'output_attentions'": lambda: {**labelled(), "output_attentions": True},
    "neither input_ids nor inputs_embeds": lambda: {"labels": tokens(1, 3)},
    "begin with these": lambda: {**labelled(), "labels": tokens(2, 18)},
    "the batch is empty": lambda: {"input_ids": tokens(1, 0)},
    "one flattened row": lambda: {**labelled(), "cu_seq_lens_q": torch.tensor([0, 19])},
    "position_ids begin again at token 3": lambda: {
        **labelled(1, 8),
        "position_ids": document_positions(3, 5),
        "cu_seq_lens_q": torch.tensor([0, 4, 8]),
    },
    "300 stretches of tokens": lambda: {
        "input_ids": tokens(1, 600),
        "attention_mask": torch.tensor([[1, 0] * 300]),
    },
    "input_ids is a list": lambda: {"input_ids": [[3, 4]]},
    "the batch is a list": lambda: [tokens(1, 8)],
    "input_ids has the dtype torch.float32": lambda: {"input_ids": tokens(1, 8).float()},
    "labels has the dtype torch.float64": lambda: {**labelled(), "labels": tokens(2, 19).double()},
    "cu_seq_lens_q has the dtype torch.float32": lambda: {**labelled(1, 8), "cu_seq_lens_q": torch.tensor([0.0, 8.0])},
    "1 values other than 0 and 1, the first of them nan": lambda: {
        **labelled(1, 8),
        "attention_mask": torch.tensor([[1.0] * 7 + [float("nan")]]),
    },
    "16 values other than 0 and 1, the first of them 0.5": lambda: {
        "input_ids": tokens(2, 8),
        "attention_mask": torch.full((2, 8), 0.5),
    },
    "does not ascend from 0": lambda: {**labelled(1, 8), "cu_seq_lens_q": torch.tensor([0, 5])},
}


@pytest.mark.parametrize("message", REFUSED)
def test_batches_that_cannot_be_exact_are_refused(message):
    with pytest.raises(ValueError, match=message), context().shard(REFUSED[message]()):
        pass


def test_lengths_of_keys_alone_are_refused():
    with (
        pytest.raises(ValueError, match="cu_seq_lens_k and no cu_seq_lens_q"),
        context().shard({**labelled(1), "cu_seq_lens_k": torch.tensor([0, 5, 19])}),
    ):
        pass


def test_positions_on_several_axes_are_sharded_on_each():
    axes = torch.randint(50, (3, 2, 19), generator=torch.Generator().manual_seed(0))
    with context().shard({**labelled(), "position_ids": axes}) as local:
        assert torch.equal(local["position_ids"][..., :19], axes)
    text = torch.cat([torch.arange(9), torch.arange(10)]).expand(1, 2, 19)  # of four axes the first is of the text
    block = context().shard({**labelled(), "position_ids": torch.cat([text, axes])})
    with block:
        assert block.shard.packed and [len(row) for row in block.shard.rows] == [2, 2]


def test_positions_that_count_the_tokens_of_a_mask_make_one_document():
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, :5] = mask[1, 12:] = 0
    for fill in (0, 1):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, fill)
        batch = {"input_ids": tokens(2, 19), "attention_mask": mask, "position_ids": positions}
        block = context().shard(batch)
        with block:
            assert not block.shard.packed and block.shard.rows == ((((5, 19),),), (((0, 12),),))


def test_seq_idx_repeats_what_positions_say():
    positions, numbers = document_positions(7, 12), torch.tensor([[0] * 7 + [1] * 12])
    with context().shard({"input_ids": tokens(1, 19), "position_ids": positions, "seq_idx": numbers}) as local:
        assert "seq_idx" not in local
    wrong = {"input_ids": tokens(1, 19), "position_ids": positions, "seq_idx": numbers.roll(1)}
    for batch in (wrong, {"input_ids": tokens(1, 19), "seq_idx": numbers}):
        with pytest.raises(ValueError, match="seq_idx numbers other documents"), context().shard(batch):
            pass


def test_a_mask_that_counts_documents_is_refused():
    batch = {"input_ids": tokens(1, 6), "attention_mask": torch.tensor([[1, 1, 1, 2, 2, 3]])}
    with pytest.raises(ValueError, match="attention_mask has the value 3"), context().shard(batch):
        pass
