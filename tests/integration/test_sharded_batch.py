"""Tests of `cp.shard` and `cp.gather`, and of their refusals, on real process groups."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel

import hf_context_parallel as hcp
from hf_context_parallel.data.batch import SHARD
from hf_context_parallel.verification.types import tiny
from hf_context_parallel.verification.types.tiny import tiny_config
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

# Batches of all kinds


def inputs_of_a_shard() -> dict:
    cp = context()
    batch = {**labelled(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with cp.shard(batch) as local:
        return local


def test_a_shard_has_what_the_model_needs_and_is_padded_inside(on_ranks):
    batch = labelled(2, 10)
    shards = on_ranks(2, inputs_of_a_shard)
    for local in shards:
        assert set(local) == {
            "input_ids",
            "labels",
            "shift_labels",
            "position_ids",
            "use_cache",
            "num_items_in_batch",
        }
        assert local["use_cache"] is False
        assert local["num_items_in_batch"] == (batch["labels"][:, 1:] != -100).sum()
        assert local["shift_labels"].is_contiguous()
        assert local["input_ids"].shape == (2, 6)  # 12 in all, of which 2 are padding
    first, second = (local["position_ids"][0].tolist() for local in shards)
    assert (first, second) == ([0, 1, 2, 9, 0, 0], [3, 4, 5, 6, 7, 8])
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(shards[1]["shift_labels"], shifted[:, 3:9])
    torch.testing.assert_close(shards[0]["shift_labels"][:, :4], shifted[:, [0, 1, 2, 9]])
    assert (shards[0]["shift_labels"][:, 4:] == -100).all()


def embedded_errors() -> tuple[float, float]:
    """Compute the errors of loss and input gradients of a batch with `inputs_embeds`."""
    cp, batch = context(), labelled()
    whole, sharded = tiny_model("llama", None), tiny_model("llama", "context_parallel")
    embeds = [model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_() for model in (whole, sharded)]
    expected = whole(inputs_embeds=embeds[0], labels=batch["labels"], use_cache=False).loss
    expected.backward()
    with cp.shard({"input_ids": None, "inputs_embeds": embeds[1], "labels": batch["labels"]}, sharded) as local:
        loss = sharded(**local).loss
        loss.backward()
    return error(reduced(loss), expected), error(reduced(embeds[1].grad), embeds[0].grad)


def test_embeddings_can_be_sharded_and_get_their_gradients(on_ranks):
    for loss, gradient in on_ranks(3, embedded_errors):
        assert loss < 1e-6 and gradient < 1e-7


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


# Gather


def gather_errors(dtype: torch.dtype) -> tuple[float, float]:
    """Gather outputs in order, and compute the gradient of a loss of them. Every rank divides its loss by N."""
    cp, batch = context(), labelled(2, 11)
    weight = torch.randn(2, 11, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = torch.randn(2, 11, 3, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    (whole * weight).sin().sum().backward()
    with cp.shard(batch) as local:
        columns = local["position_ids"]
        mine = whole.detach()[torch.arange(2)[:, None], columns].requires_grad_()
        gathered = cp.gather(mine)
        ((gathered * weight).sin().sum() / cp.size).backward()
        with pytest.raises(ValueError, match="begins with"):
            cp.gather(gathered)
        ids = cp.gather(local["input_ids"])
    assert torch.equal(ids, batch["input_ids"])
    expected = whole.grad[torch.arange(2)[:, None], columns]
    real = cp.positions(12) < 11
    assert (mine.grad[:, ~real] == 0).all()
    return error(gathered, whole), error(mine.grad[:, real], expected[:, real])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-2)])
def test_gather_restores_the_order_and_sums_gradients(on_ranks, dtype, bound):
    for forward, backward in on_ranks(3, gather_errors, dtype):
        assert forward == 0 and backward < bound


def test_gather_outside_of_shard_says_where_it_belongs():
    with pytest.raises(RuntimeError, match=r"inside `with cp.shard"):
        context().gather(torch.zeros(1, 2))


# Wrapped models, and blocks inside blocks


def ddp_errors() -> float:
    """DDP takes the mean of gradients: a loss times the number of ranks gives the sum of them."""
    cp, batch = context(), labelled()
    whole, sharded = tiny_model("qwen2", None), DistributedDataParallel(tiny_model("qwen2", "context_parallel"))
    whole(**batch, use_cache=False).loss.backward()
    with cp.shard(batch, sharded) as local:
        (sharded(**local).loss * cp.size).backward()
    return max(error(a.grad, b.grad) for a, b in zip(sharded.parameters(), whole.parameters()))


def test_a_model_wrapped_by_ddp_is_exact(on_ranks):
    assert max(on_ranks(2, ddp_errors)) < 1e-7


def nested_errors(checkpointing: dict | None) -> float:
    """Evaluate another batch, of another length, between forward and backward of a batch."""
    cp, batch, other = context(), labelled(), labelled(1, 7, seed=5)
    whole, sharded = tiny_model("llama", None), tiny_model("llama", "context_parallel")
    if checkpointing is not None:
        sharded.gradient_checkpointing_enable(checkpointing)
        sharded.train()
    whole(**batch, use_cache=False).loss.backward()
    expected = whole(**other, use_cache=False).loss
    with cp.shard(batch, sharded) as local:
        loss = sharded(**local).loss
        with torch.no_grad(), cp.shard(other, sharded) as inner:
            found = reduced(sharded(**inner).loss)
        loss.backward()
    gradients = [error(reduced(a.grad), b.grad) for a, b in zip(sharded.parameters(), whole.parameters())]
    return max(error(found, expected), *gradients)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_blocks_nest(on_ranks, checkpointing):
    assert max(on_ranks(2, nested_errors, checkpointing)) < 1e-6


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_backward_belongs_inside_the_block(checkpointing):
    cp, batch, model = context(), labelled(), tiny_model("llama", "context_parallel")
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        model.train()
    with cp.shard(batch, model) as local:
        loss = model(**local).loss
    with pytest.raises(RuntimeError, match=r"backward\(\) inside `with cp.shard"):
        loss.backward()
    with cp.shard(batch, model) as local:
        loss = model(**local).loss
        with pytest.raises(RuntimeError, match="leave the inner one first"), cp.shard(labelled(seed=3), model):
            loss.backward()


def test_a_block_is_entered_once():
    block = context().shard(labelled())
    with block:
        pass
    with pytest.raises(RuntimeError, match=r"call cp.shard"), block:
        pass


def test_training_goes_on_unsharded_after_a_shard():
    """Recomputation outside of a batch is refused only for layers that ran inside of one."""
    cp, batch, model = context(), labelled(), tiny_model("llama", "context_parallel")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    with cp.shard(batch, model) as local:
        model(**local).loss.backward()
    model(**batch, use_cache=False).loss.backward()


def test_a_model_without_our_attention_is_noticed():
    model = tiny_model("llama", "sdpa")
    with pytest.raises(ValueError, match="set_attn_implementation"), context().shard(labelled(), model):
        pass
    with pytest.raises(ValueError, match="set_attn_implementation"), context().shard(labelled()) as local:
        model(**local)
    changed = tiny_model("llama", "context_parallel")
    for layer in changed.model.layers:  # a copy of the configuration, as some wrappers make one
        layer.self_attn.config = model.config
    with (
        pytest.raises(ValueError, match="computes with its attention mask itself"),
        context().shard(labelled()) as local,
    ):
        changed(**local)


def test_heads_and_losses_that_are_not_causal_language_modelling_are_refused():
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

    config = tiny_config("llama")
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model = auto.from_config(config, attn_implementation="context_parallel")
        with (
            pytest.raises(ValueError, match="not one of Transformers' causal language models"),
            context().shard(labelled()) as local,
        ):
            model(**local)
    model = tiny_model("llama", "context_parallel")

    class Mine(type(model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="a forward of its own"), context().shard(labelled(), Mine(model.config)):
        pass
    model.loss_function = lambda *args, **kwargs: 0.0
    with pytest.raises(ValueError, match="a loss function of its own"), context().shard(labelled(), model):
        pass
    model = AutoModel.from_config(config, attn_implementation="context_parallel")
    with context().shard({"input_ids": tokens(1, 5)}, model) as local:
        assert model(**local).last_hidden_state.shape == (1, 6, 32)


# Refusals


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
    "does not ascend from 0": lambda: {**labelled(1, 8), "cu_seq_lens_q": torch.tensor([0, 5])},
}


@pytest.mark.parametrize("message", REFUSED)
def test_batches_that_cannot_be_exact_are_refused(message):
    with pytest.raises(ValueError, match=message), context().shard(REFUSED[message]()):
        pass


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": "2"}, "size='2'"),
        ({"layout": "zigzak"}, "Did you mean 'zigzag'"),
        ({"comm_type": "ring"}, "comm_type='ring' is not one of 'p2p', 'all_gather', 'a2a'"),
        ({"check_batch": 1}, "check_batch=1"),
        ({"verify": "yes"}, "verify='yes'"),
    ],
)
def test_settings_are_validated_where_they_are_written(values, message):
    with pytest.raises(ValueError, match=message):
        hcp.ContextParallelConfig(**values)


def refused_model(change: str):
    """Make a model that cannot be exact on shards."""
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    changes = {
        "a refused type": ("prophetnet", {}),
        "layers skipped at random": ("opt", {"layerdrop": 0.1}),
        "an encoder": ("bart", {}),
        "an image's tokens": ("git", {}),
        "packed documents and dynamic RoPE": ("llama", {"rope_parameters": scaled, "max_position_embeddings": 4}),
    }
    model_type, values = changes[change]
    config = tiny.tiny_config(model_type, **values)
    if model_type == "bart":
        return AutoModel.from_config(config, attn_implementation="context_parallel")
    if model_type == "git":  # its attention does not accept our name
        return tiny.tiny_model(config, None, torch.float32).train()
    return tiny.tiny_model(config, "context_parallel", torch.float32).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a refused type", "'prophetnet' is refused: it predicts several tokens at a time"),
        ("layers skipped at random", "layerdrop=0.1"),
        ("an encoder", "BartModel is an encoder and a decoder"),
        ("an image's tokens", "'git' is refused: it needs images"),
        ("packed documents and dynamic RoPE", "depends on their order"),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_models_that_would_not_be_exact_are_refused_by_name(change, message, told):
    """A model is refused when it is passed to `shard`, and when it runs without having been passed."""
    model = refused_model(change)
    batch = {**labelled(1, 10), "position_ids": document_positions(6, 4)}
    with pytest.raises(ValueError, match=message), context().shard(batch, model if told else None) as local:
        model(**local)


def test_keywords_and_masks_that_are_not_known_are_refused():
    model = tiny_model("llama", "context_parallel")
    for extra, message in (
        ({"alibi_slopes": torch.ones(4)}, "asks for alibi_slopes=Tensor"),
        ({"rescale": 30.0}, "asks for rescale=30.0"),
        ({"sliding_window": 4}, "asks for sliding_window=4 and its mask has None"),
        ({"attention_mask": torch.ones(2, 1, 20, 20)}, "given an attention mask of shape"),
        ({"attention_mask": torch.zeros(2, 20)}, "given an attention_mask"),
    ):
        with pytest.raises(ValueError, match=message), context().shard(labelled()) as local:
            model(**local | extra)


def test_calls_without_all_that_shard_yields_are_refused():
    model = tiny_model("llama", "context_parallel")
    for left_out in ("position_ids", "use_cache", "shift_labels", "num_items_in_batch"):
        with pytest.raises(ValueError, match=r"cp\.shard yields"), context().shard(labelled()) as local:
            model(**{name: value for name, value in local.items() if name != left_out})
    with pytest.raises(ValueError, match=r"cp\.shard yields"), context().shard(labelled()) as local:
        model.generate(local["input_ids"], max_new_tokens=1)


@pytest.mark.filterwarnings("error")
def test_a_call_that_raised_does_not_hide_the_next_one():
    model, teacher = tiny_model("llama", "context_parallel"), tiny_model("llama", None)
    with pytest.raises(ValueError, match="set_attn_implementation"), context().shard(labelled(), model) as local:
        with pytest.raises(ValueError, match="not know"):
            model(**local, rescale=30.0)
        teacher(**local)


def test_every_model_in_a_block_is_checked():
    model, teacher = tiny_model("llama", "context_parallel"), tiny_model("llama", None)
    with pytest.raises(ValueError, match="set_attn_implementation"), context().shard(labelled(), model) as local:
        model(**local)
        teacher(**local)


def test_backward_of_two_batches_at_once_is_refused():
    """Backward of two batches is refused under reentrant checkpointing, whose graph is made in backward."""
    cp, model = context(), tiny_model("llama", "context_parallel")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    with cp.shard(labelled(), model) as local:
        first = model(**local).loss
    with pytest.raises(RuntimeError, match="backward"), cp.shard(labelled(seed=3), model) as local:
        (first + model(**local).loss).backward()


def test_lengths_that_are_not_the_plans_are_refused_with_what_would_do():
    model = tiny_model("llama", "context_parallel")
    with pytest.raises(ValueError, match="'vision_config': 'sdpa'"), context().shard(labelled()):
        model(input_ids=tokens(2, 9))


def test_prefix_tuning_is_refused():
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    model = tiny_model("llama", "context_parallel", torch.float32)
    model = get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5))
    with (
        pytest.raises(ValueError, match=r"prefix tuning|given an attention_mask"),
        context().shard(labelled()) as local,
    ):
        model(**local)


# The collator


def collator_errors() -> float:
    """The collator yields the shard that `shard` makes of the whole batch."""
    import pickle

    cp, batch = context(), labelled()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(2)]
    collate = hcp.ContextParallelDataCollator(torch.utils.data.default_collate, cp.config, cp.rank)
    collated = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(collate))(rows)))
    assert SHARD in collated
    with cp.shard(batch) as expected, cp.shard(collated) as found:
        assert found.keys() == expected.keys()
        for name in found.keys() - {"use_cache"}:
            assert torch.equal(found[name], expected[name])
    with (
        pytest.raises(ValueError, match="sharded for rank"),
        cp.shard(
            hcp.ContextParallelDataCollator(torch.utils.data.default_collate, cp.config, (cp.rank + 1) % cp.size)(rows)
        ),
    ):
        pass


def test_the_collator_shards_like_shard_and_pickles(on_ranks):
    on_ranks(2, collator_errors)


def test_the_collator_takes_a_tokenizer():
    from transformers import ByT5Tokenizer

    collate = hcp.ContextParallelDataCollator(ByT5Tokenizer(), hcp.ContextParallelConfig(size=2), 0)
    assert collate([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}])["input_ids"].tolist() == [[5, 0], [5, 0]]
