"""Refusals of models and inputs that would give wrong numbers without an error, or leave ranks waiting."""

from __future__ import annotations

import types

import pytest
import torch
import torch.distributed as dist
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_context_parallel.integration.model_registry import TEXT_ALONE
from hf_context_parallel.verification.types import tiny
from tests.helpers.models import context, document_positions, needs_chunks_of_documents, tiny_model, tokens


def labelled(rows: int = 2, length: int = 19) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(rows, length), "labels": tokens(rows, length)}


def loss_in(batch: dict, model: torch.nn.Module, **more) -> torch.Tensor:
    with context().shard(batch, model) as local:
        return model(**local, **more).loss.detach()


def patched(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


def test_a_forward_patched_on_a_model_is_refused():
    model = tiny_model("llama", "context_parallel")
    model.forward = types.MethodType(patched, model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .* has a forward of its own, as fused losses"):
        loss_in(labelled(), model)


def test_a_forward_patched_on_the_class_is_refused(monkeypatch):
    model = tiny_model("llama", "context_parallel")
    stock = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *args, **kwargs: stock(self, *args, **kwargs))
    with pytest.raises(ValueError, match="has a forward of its own"):
        loss_in(labelled(), model)


def test_a_forward_that_is_only_wrapped_is_not():
    """A forward that accelerate has wrapped for autocast is accepted."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    model = tiny_model("llama", "context_parallel")
    expected = loss_in(labelled(), model)
    model.forward = convert_outputs_to_fp32(model.forward)
    assert loss_in(labelled(), model) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdaLoraConfig(total_step=10, task_type="CAUSAL_LM"), "AdaLoraModel does more than calling the model"),
        (LoHaConfig(rank_dropout=0.1, target_modules=["q_proj"]), "'default' has rank_dropout=0.1"),
        (LoHaConfig(module_dropout=0.1, target_modules=["q_proj"]), "'default' has module_dropout=0.1"),
    ],
    ids=["AdaLoRA", "rank dropout", "module dropout"],
)
def test_tuners_that_do_more_or_draw_weights_are_refused(config, message):
    model = get_peft_model(tiny_model("llama", "context_parallel", torch.float32), config).train()
    with pytest.raises(ValueError, match=message):
        loss_in(labelled(), model)


def test_tuners_that_draw_nothing_in_evaluation_are_not():
    config = LoHaConfig(module_dropout=0.1, target_modules=["q_proj"])
    loss_in(labelled(), get_peft_model(tiny_model("llama", "context_parallel", torch.float32), config).eval())
    loss_in(labelled(), get_peft_model(tiny_model("llama", "context_parallel", torch.float32), LoraConfig()).train())


def test_the_forward_of_a_model_with_a_loss_is_not_called_unseen():
    model = tiny_model("qwen3_moe", "context_parallel")
    with (
        pytest.raises(ValueError, match=r"Qwen3MoeModel runs by itself .* Call it as model"),
        context().shard(labelled(), model) as local,
    ):
        model.forward(**local)
    with context().shard({"input_ids": tokens(2, 19)}, model) as local:  # no loss, nothing to be missed
        model.model(**local)


def test_labels_that_were_changed_alone_are_refused():
    model = tiny_model("llama", "context_parallel")
    with context().shard(labelled(), model) as local:
        assert local["labels"] is local["shift_labels"]
        local["labels"] = local["labels"].clone()
        model(**local)  # the same still
        local["labels"][0, :5] = -100
        with pytest.raises(ValueError, match="labels and shift_labels differ"):
            model(**local)


def test_keeping_the_last_logits_is_refused():
    with pytest.raises(ValueError, match="logits_to_keep would keep the last tokens of each rank's shard"):
        loss_in(labelled(), tiny_model("llama", "context_parallel"), logits_to_keep=1)


@needs_chunks_of_documents
def test_chunks_that_begin_inside_of_one_are_refused():
    model = tiny_model("llama4_text", "context_parallel")
    size = model.config.attention_chunk_size
    whole = document_positions(10, 9)
    for begin in (size, 0):
        loss_in({**labelled(1), "position_ids": torch.cat([whole[:, :10] + begin, whole[:, 10:]], dim=1)}, model)
    with pytest.raises(ValueError, match=f"chunks of {size} positions, and a packed document begins"):
        loss_in({**labelled(1), "position_ids": torch.cat([whole[:, :10] + 1, whole[:, 10:]], dim=1)}, model)


def test_attention_does_not_ignore_the_documents_of_an_open_batch():
    cp = context()
    q = torch.randn(1, 2, 12, 8, dtype=torch.float64)
    packed = {"input_ids": tokens(1, 12), "position_ids": document_positions(5, 7)}
    with cp.shard(packed):
        with pytest.raises(ValueError, match="ignores the active batch"):
            cp.attention(q, q, q)
        said = cp.attention(q, q, q, cu_seqlens=torch.tensor([0, 5, 12]))
    assert said.equal(cp.attention(q, q, q, cu_seqlens=torch.tensor([0, 5, 12])))
    with cp.shard({"input_ids": tokens(1, 12)}):
        cp.attention(q, q, q)


def test_lengths_of_keys_alone_are_refused():
    with (
        pytest.raises(ValueError, match="cu_seq_lens_k and no cu_seq_lens_q"),
        context().shard({**labelled(1), "cu_seq_lens_k": torch.tensor([0, 5, 19])}),
    ):
        pass


def test_three_axes_of_positions_say_what_to_do():
    with (
        pytest.raises(ValueError, match=r"have 2 dimensions\. For text alone all axes of M-RoPE are equal: leave"),
        context().shard({**labelled(), "position_ids": torch.arange(19).expand(3, 2, 19)}),
    ):
        pass


def test_a_model_that_compares_tokens_with_their_own_labels_needs_those():
    batch = {"input_ids": tokens(2, 19), "shift_labels": tokens(2, 19)}
    with pytest.raises(ValueError, match="Give labels"):
        loss_in(batch, tiny_model("xlnet", "context_parallel"))


def message_of(case: str) -> str:
    """Return the error of this rank for a batch that only some ranks would fail on."""
    cp, batch, kind = context(), labelled(), "llama"
    if case == "a block":
        kind = "gemma3"
        batch["token_type_ids"] = torch.zeros(2, 19, dtype=torch.long)
        batch["token_type_ids"][:, 12:15] = 1  # of the second rank alone
    elif case == "a token":
        batch["input_ids"][1, 17] = 4096
    elif case == "a label":
        batch["labels"][0, 18] = -1
    elif case == "a type":
        kind = "bert"
        batch["token_type_ids"] = torch.zeros(2, 19, dtype=torch.long)
        batch["token_type_ids"][0, 17] = 20
    elif case == "a position":
        kind = "gpt2"
        batch = labelled(1, 4096)
    model = tiny_model(kind, "context_parallel")
    if case == "a mode":
        model.train(dist.get_rank() == 0)
    try:
        with cp.shard(batch, model) as local:
            if case in ("changed positions", "changed labels"):
                name = {"changed positions": "position_ids", "changed labels": "labels"}[case]
                local[name] = local[name].where(local["position_ids"] != 0, 5)  # of the first rank's tokens alone
            model(**local)
    except ValueError as refusal:
        return str(refusal)
    return "nothing"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a block", "'gemma3_text' masks attention by 'blockwise_overlay"),
        ("a token", "rank 0 of the group: input_ids has 4096, and LlamaForCausalLM takes 0 to"),
        ("a label", "rank 0 of the group: labels has -1, and LlamaForCausalLM takes 0 to"),
        ("a type", "rank 0 of the group: token_type_ids has 20, and BertLMHeadModel takes 0 to"),
        ("changed positions", "the model must be called with all that cp.shard yields: position_ids"),
        ("changed labels", "labels and shift_labels differ"),
        ("a position", "rank 0 of the group: the batch has a token at position 4095, and GPT2LMHeadModel has learned"),
        ("a mode", "ranks 0 and 1 of the group have different batches or models"),
    ],
)
def test_what_one_rank_would_fail_on_all_refuse(on_ranks, case, message):
    assert [text.startswith(message) for text in on_ranks(2, message_of, case)] == [True, True]


def test_a_router_that_mixes_the_tokens_of_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"'doge' is refused with is_moe=True: its experts are chosen by logits of"):
        loss_in(labelled(), tiny_model("doge", "context_parallel", is_moe=True))


def test_cross_attention_is_refused():
    model = tiny_model("gpt2", "context_parallel", add_cross_attention=True)
    with (
        pytest.raises(ValueError, match="encoder_hidden_states: cross-attention"),
        context().shard(labelled()) as local,
    ):
        model(**local, encoder_hidden_states=torch.zeros(2, 20, model.config.n_embd, dtype=torch.float64))


class Broken(dict):
    def items(self):
        raise TypeError("no such thing")


def message_of_another_error() -> str:
    try:
        with context().shard(labelled() if dist.get_rank() else Broken()):
            return "nothing"
    except ValueError as refusal:
        return str(refusal)


def test_other_errors_arrive_with_their_type(on_ranks):
    assert on_ranks(2, message_of_another_error) == ["rank 0 of the group: TypeError: no such thing"] * 2


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "llama4", "mllama"])
def test_the_dictionary_that_refusals_recommend_runs(model_type):
    """The dictionary runs with its entry for the whole model, and without it where there is a vision tower."""
    config = tiny.tiny_config(model_type)
    for chosen in [TEXT_ALONE] + [{k: v for k, v in TEXT_ALONE.items() if k}] * (model_type in ("gemma3", "gemma4")):
        names = {"", *config.sub_configs}
        asked = {part: name for part, name in chosen.items() if part in names}
        model = AutoModelForCausalLM.from_config(config, attn_implementation=asked)
        assert loss_in(labelled(), model).isfinite()
