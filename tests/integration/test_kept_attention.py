"""Choice of the place where attention is kept: alike on all ranks, by what fits."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig

import hf_context_parallel as hcp
from hf_context_parallel.distributed import free_memory
from hf_context_parallel.integration.border.parallelize import borders_of
from hf_context_parallel.integration.kept_attention import fitting_place, job_of
from hf_context_parallel.memory.facts import facts_of
from hf_context_parallel.memory.job import Job
from hf_context_parallel.memory.parts import parts_of
from tests.helpers.border import batch_for, model_with
from tests.helpers.models import context, labelled

SMALL = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4, vocab_size=64, head_dim=64
)


def test_the_first_place_that_fits_is_taken():
    job = Job(facts_of(SMALL), 4096, cp=2)
    on_device, on_host = (parts_of(replace(job, attention_checkpoints=x)).total for x in ("device", "host"))
    assert on_host < on_device
    both = "device", "host"
    assert fitting_place(job, job.dtype, on_device, both) == ("device", on_device)
    assert fitting_place(job, job.dtype, on_device - 1, both) == ("host", on_host)
    assert fitting_place(job, job.dtype, on_host - 1, both) == ("off", on_host)
    assert fitting_place(job, job.dtype, on_device - 1, both[:1]) == ("off", on_device)


def chosen(rank_with_little: int, model_type: str, checkpointed: bool, setting: str) -> tuple[str, list[str]]:
    """Return the place that was chosen in a step of a model, and what was logged."""
    lines, cp = [], context(attention_checkpoints=setting)
    model = hcp.parallelize(model_with("causal", model_type, "context_parallel").train(), cp)
    if checkpointed:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    logger, handler = logging.getLogger("hf_context_parallel"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    read = free_memory.free_bytes
    if cp.rank == rank_with_little:
        free_memory.free_bytes = lambda device: -free_memory.psutil.Process().memory_info().rss + 1000
    try:
        for _ in range(2):
            model(**batch_for("causal")).loss.backward()
    finally:
        free_memory.free_bytes = read
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return borders_of(model)[0].attention_checkpoints, [line for line in lines if "attention_checkpoints" in line]


@pytest.mark.parametrize(
    "rank_with_little, model_type, checkpointed, setting, expected, reason",
    [
        (-1, "qwen3", True, "auto", "device", "with kept attention needs"),
        (0, "qwen3", True, "auto", "off", "with kept attention needs"),
        (1, "qwen3", True, "auto", "off", "another rank has less memory"),
        (-1, "gpt2", True, "auto", "device", "with kept attention needs"),
        (-1, "qwen3", False, "auto", "off", None),
        (-1, "qwen3", False, "device", "off", None),
        (1, "qwen3", True, "device", "device", None),
    ],
)
def test_all_ranks_choose_alike(on_ranks, rank_with_little, model_type, checkpointed, setting, expected, reason):
    found = on_ranks(2, chosen, rank_with_little, model_type, checkpointed, setting)
    assert [place for place, _ in found] == [expected] * 2
    lines = found[0][1]  # the first rank logs once
    assert [reason in line for line in lines] == ([True] if reason else [])
    assert found[1][1] == []


@pytest.mark.parametrize("in_block", [False, True])
def test_a_step_of_ranks_of_which_one_checkpoints_is_refused(on_ranks, in_block):
    with pytest.raises(AssertionError, match="batches or models"):
        on_ranks(2, one_checkpoints, in_block)


def one_checkpoints(in_block: bool) -> None:
    cp, batch = context(), labelled()
    model = model_with("causal", "qwen3", "context_parallel").train()
    if not in_block:
        hcp.parallelize(model, cp)
    if cp.rank:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if not in_block:
        model(**batch).loss.backward()
        return
    with cp.shard(batch, model) as local:
        model(**local).loss.backward()


def job_under_fsdp() -> tuple[int, torch.dtype]:
    """Describe a step while the outer unit is gathered in bfloat16: the ranks that share weights, and their dtype."""
    cp, found = context(), []
    model = model_with("causal", "qwen3", "context_parallel", tie_word_embeddings=False, num_key_value_heads=1).float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    hcp.parallelize(fully_shard(model, mp_policy=policy), cp)
    hook = model.model.norm.register_forward_pre_hook(
        lambda *_: found.append(job_of(model, cp.group, 57, torch.device("cpu")))
    )
    model(**labelled()).loss.backward()
    hook.remove()
    [(job, weights)] = found
    return job.fsdp, weights


def test_weights_that_fsdp2_shards_are_counted_by_its_mesh(on_ranks):
    assert on_ranks(3, job_under_fsdp) == [(3, torch.float32)] * 3
