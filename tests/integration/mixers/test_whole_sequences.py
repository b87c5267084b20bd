"""Modules that see whole sequences, and models that are wrapped, compiled, checkpointed or drop out."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

import hf_context_parallel as hcp
from hf_context_parallel.verification.types.check import finite_masks
from hf_context_parallel.verification.types.tiny import tiny_config, tiny_model
from tests.helpers.models import context, document_positions, needs_chunks_of_documents, tokens
from tests.helpers.whole_sequences import batch_of, largest_difference, loss_and_gradients

HYBRIDS = ("jamba", "bloom")


def checkpointing_difference(model_type: str, reentrant: bool) -> float:
    cp, batch = context(), batch_of(1, 30, position_ids=document_positions(17, 1, 12))
    model = tiny_model(tiny_config(model_type), "context_parallel").train()
    expected = loss_and_gradients(model, batch, cp)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return largest_difference(loss_and_gradients(model, batch, cp), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_recomputation_is_resharded_too(on_ranks, model_type, reentrant):
    assert max(on_ranks(3, checkpointing_difference, model_type, reentrant)) < 1e-12


def adapter_difference(model_type: str) -> float:
    """Compare LoRA on all linear layers with the same on one process."""
    cp, batch = context(), batch_of(2, 23)
    adapters = []
    for attention in ("context_parallel", "eager"):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapters.append(get_peft_model(tiny_model(tiny_config(model_type), attention), config))
    found = loss_and_gradients(adapters[0], batch, cp)
    whole = adapters[1]
    with finite_masks():
        loss = whole(**batch, use_cache=False).loss
    loss.backward()
    expected = [loss.detach()] + [parameter.grad for parameter in whole.parameters() if parameter.requires_grad]
    return largest_difference(found, expected)


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "gemma2", "gpt_oss"])
def test_adapters_on_all_of_a_model_are_exact(on_ranks, model_type):
    assert max(on_ranks(2, adapter_difference, model_type)) < 2e-6  # norms and softmax compute in float32


def compiled_difference(model_type: str) -> float:
    cp, batch = context(), batch_of(2, 24)
    model = tiny_model(tiny_config(model_type), "context_parallel", torch.float32)
    expected = loss_and_gradients(model, batch, cp)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    return largest_difference(loss_and_gradients(model, batch, cp, lambda _: compiled), expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", ["gemma3_text", "jamba"])
def test_a_compiled_model_is_exact(on_ranks, model_type):
    assert max(on_ranks(2, compiled_difference, model_type)) < 1e-4


def test_forwards_are_replaced_once():
    model = tiny_model(tiny_config("lfm2"), "context_parallel")
    cp, batch = context(), batch_of()
    expected = model(**batch, use_cache=False).loss
    with cp.shard(batch, model) as outer:
        model(**outer)
        forwards = [vars(module).get("forward") for module in model.modules()]
        with cp.shard(batch_of(length=12), model) as inner:
            model(**inner)
        model(**outer).loss.backward()
    assert any(forwards) and [vars(module).get("forward") for module in model.modules()] == forwards
    assert torch.equal(model(**batch, use_cache=False).loss, expected)


def perturbed(model_type: str) -> tuple[float, float, float]:
    """Change a token of document 1, and return how far outputs and gradients move.

    Returns:
        Largest changes of the outputs of document 1, of the outputs of the others, and of the gradients of all
        embeddings for a loss of document 2.
    """
    cp, positions = context(), document_positions(13, 9, 8)
    model = tiny_model(tiny_config(model_type), "context_parallel")
    ids = tokens(1, 30)
    changed = ids.clone()
    changed[0, 4] = 3 + (changed[0, 4] - 2) % 60
    results = []
    for input_ids in (ids, changed):
        embeds = model.get_input_embeddings()(input_ids).detach().requires_grad_()
        with cp.shard({"inputs_embeds": embeds, "position_ids": positions}, model) as local:
            logits = cp.gather(model(**local).logits)
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
            (logits[:, 13:22] * weights[:, 13:22]).sum().div(cp.size).backward()
        dist.all_reduce(embeds.grad)
        results.append((logits.detach(), embeds.grad))
    (a, grad_a), (b, grad_b) = results
    assert (grad_a[:, :13] == 0).all() and (grad_a[:, 22:] == 0).all() and (grad_a[:, 13:22] != 0).any()
    first = (a - b)[:, 4:13].abs().max().item()
    return first, (a - b)[:, 13:].abs().max().item(), (grad_a - grad_b).abs().max().item()


@pytest.mark.parametrize(
    "model_type",
    [
        *("llama", "gemma3_text", "bert", "lfm2", "qwen3_next", "mamba"),
        pytest.param("llama4_text", marks=needs_chunks_of_documents),
    ],
)
def test_a_document_does_not_notice_another(on_ranks, model_type):
    """No bit of other documents changes. With experts rounding does, since tokens are computed in other places."""
    for first, others, gradients in on_ranks(3, perturbed, model_type):
        assert first > 1e-4
        bound = 1e-9 if model_type in ("llama4_text", "qwen3_next") else 0.0
        assert others <= bound and gradients <= bound


# Wrapped


def data_parallel_difference(model_type: str) -> float:
    """Compare DDP over the ranks of the group with no wrapper."""
    from torch.nn.parallel import DistributedDataParallel

    cp, batch = context(), batch_of(1, 26)
    model = tiny_model(tiny_config(model_type), "context_parallel")
    expected = loss_and_gradients(model, batch, cp)
    model.zero_grad(set_to_none=True)
    wrapped = DistributedDataParallel(model)
    with cp.shard(batch, wrapped) as local:
        loss = wrapped(**local).loss
        loss.backward()
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return largest_difference([loss, *(parameter.grad * cp.size for parameter in model.parameters())], expected)


@pytest.mark.parametrize("model_type", ["gpt_oss", "mamba", "mamba2"])
def test_a_data_parallel_model_is_exact(on_ranks, model_type):
    """DDP averages the gradients of sinks, and of modules that one rank alone computes, like all others."""
    assert max(on_ranks(3, data_parallel_difference, model_type)) < 1e-12


def fully_sharded_difference(model_type: str, size: int, documents: tuple[tuple[int, ...], ...]) -> float:
    """Compare FSDP2 over all ranks with no wrapper.

    Args:
        size: ranks of a CP group.
        documents: the lengths of the documents of each CP group.
    """
    from torch.distributed.fsdp import fully_shard

    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size))
    lengths = documents[cp.groups.data_rank]
    batch = batch_of(1, sum(lengths), position_ids=document_positions(*lengths))
    expected = loss_and_gradients(tiny_model(tiny_config(model_type), "context_parallel"), batch, cp)
    model = tiny_model(tiny_config(model_type), "context_parallel")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with cp.shard(batch, model) as local:
        loss = model(**local).loss
        loss.backward()
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    grads = [parameter.grad for parameter in model.parameters()]  # None where nothing is learned
    world = dist.get_world_size()  # from mean to sum
    full = [torch.zeros(()) if grad is None else grad.full_tensor() * world for grad in grads]
    return largest_difference([loss, *full], expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "lfm2", "jamba"])
def test_a_fully_sharded_model_is_exact(on_ranks, model_type):
    assert max(on_ranks(2, fully_sharded_difference, model_type, 2, ((26,),))) < 1e-12


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "lfm2"])
def test_groups_with_documents_of_other_lengths_share_parameters(on_ranks, model_type):
    """A whole model, and a module in a layer: both run once for each length of sequences on a rank."""
    assert max(on_ranks(4, fully_sharded_difference, model_type, 2, ((5, 1, 8, 5), (19,)))) < 1e-12


def refusal_of_generating() -> str:
    model = tiny_model(tiny_config("llama"), "context_parallel")
    with pytest.raises(ValueError) as refusal, context().shard({"input_ids": tokens(1, 13)}, model) as local:
        model.generate(local["input_ids"], max_new_tokens=2, pad_token_id=0)
    return str(refusal.value)


def test_generating_inside_of_a_batch_is_refused_on_every_rank(on_ranks):
    """Generation is refused with 13 tokens, where one rank alone has padding and so a mask that is not all ones."""
    assert all("outside the block" in told for told in on_ranks(2, refusal_of_generating))


def runs_as_users_run_it(model_type: str) -> bool:
    model = tiny_model(tiny_config(model_type), "context_parallel")
    with context().shard(batch_of(2, 24), model) as local:
        return bool(model(**local).loss.isfinite())


@pytest.mark.parametrize("model_type", ["blt", "emu3", "mllama"])
def test_what_is_known_as_exact_is_not_refused(on_ranks, model_type):
    assert all(on_ranks(2, runs_as_users_run_it, model_type))
