"""Tensor and context parallelism together: a model on T x C (x D) ranks computes the same as on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_context_parallel as hcp
from hf_context_parallel.distributed.worker_pool import WorkerPool
from tests.helpers.models import needs_sharding_while_loading, some_labels, tiny_model, tokens
from tests.helpers.trainer import STOCK, history, make_trainer, samples

pytestmark = needs_sharding_while_loading

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tensor_parallel_model(folder, attention="context_parallel", dtype=torch.float64, **sizes):
    """Load the model in the folder, sharded."""
    config = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, attn_implementation=attention, dtype=dtype
    )


def batch() -> dict[str, torch.Tensor]:
    input_ids = tokens(2, 45)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    labels = some_labels(input_ids).masked_fill(mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def whole(folder, dtype) -> tuple[float, dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(folder, size, dtype, settings, sizes) -> tuple[float, dict[str, torch.Tensor]]:
    model = tensor_parallel_model(folder, dtype=dtype, **sizes)
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size, **settings), hcp.mesh_of(model))
    with cp.shard(batch(), model) as local:
        loss = model(**local).loss
        (loss * cp.size).backward()  # FSDP takes the mean over the CP group
    loss = loss.detach()
    dist.all_reduce(loss, group=cp.groups.group)
    return float(loss), {name: full(parameter.grad) for name, parameter in model.named_parameters()}


def saved(folder, model_type: str, dtype=torch.float32, **changes) -> Path:
    """Save a model in a folder, from which Transformers loads it sharded."""
    tiny_model(model_type, None, dtype, **{**HEADS, **changes}).save_pretrained(folder / model_type)
    return folder / model_type


def assert_exact(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for name, gradient in expected[1].items():
        largest = gradient.abs().max()
        error = (found[1][name] - gradient).abs().max() / largest.clamp(min=1e-6)
        assert error < 1e-5, f"the gradient of {name} differs by {error:.1e} of its largest entry"


TP_CP = {"tp_size": 2, "fsdp_size": 2}
SETTINGS = {
    "ring": {},
    "heads": {"comm_type": "a2a"},
    "sequence parallel": {"sequence_parallel": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    "model_type", ["llama", pytest.param("qwen2", marks=pytest.mark.exhaustive), "qwen3", "gemma2"]
)
def test_a_plain_loop_gives_the_loss_and_gradients_of_one_process(on_ranks, tmp_path, model_type, settings):
    folder = saved(tmp_path, model_type)
    expected = whole(folder, torch.float32)
    for found in on_ranks(4, sharded, folder, 2, torch.float32, settings, TP_CP):
        assert_exact(found, expected)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granite_swa", "qwen3_moe"])
def test_sinks_and_experts_are_sharded_too(on_ranks, tmp_path, model_type):
    folder = saved(tmp_path, model_type)
    expected = whole(folder, torch.float32)
    for found in on_ranks(4, sharded, folder, 2, torch.float32, {}, TP_CP):
        assert_exact(found, expected)


def trained(kind, folder, model_type, settings, sizes, options) -> list[tuple[float, float]]:
    """Train with `kind` ranks in a CP group, and return the loss and gradient norm of every step."""
    model = tensor_parallel_model(folder / model_type, dtype=torch.float32, **sizes)
    groups = dist.get_world_size() // sizes["tp_size"] // kind
    # The batch size of the Trainer is that of a CP group; make_trainer counts all ranks.
    trainer = make_trainer(kind, folder, model=model, settings=settings, groups=groups, **options)
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


CASES = {
    "padding": ("llama", {}, {}),
    "packing with accumulation": ("qwen3", {}, {"collator": "packed", "gradient_accumulation_steps": 2}),
    "sequence parallel": ("qwen3", {"sequence_parallel": True}, {}),
    "sequence parallel with checkpointing": (
        "llama",
        {"sequence_parallel": True},
        {"collator": "packed", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_trainer_gives_the_losses_and_gradient_norms_of_one_process(on_ranks, tmp_path, case):
    model_type, settings, options = CASES[case]
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path, model_type))
    [expected] = on_ranks(1, history, STOCK, tmp_path, {"model": model, **options})
    for found in on_ranks(4, trained, 2, tmp_path, model_type, settings, TP_CP, options):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def evaluation(kind, folder, sizes) -> tuple[float, np.ndarray]:
    """Return the evaluation loss, and predictions of 3 samples."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    if kind != STOCK:
        model = tensor_parallel_model(folder / "llama", dtype=torch.float32, **sizes)
    settings = None if kind == STOCK else {"sequence_parallel": True}
    trainer = make_trainer(kind, folder, model=model, groups=1, settings=settings)
    data = samples(3)
    return trainer.evaluate(data)["eval_loss"], trainer.predict(data).predictions


def test_evaluation_and_prediction_are_those_of_one_process(on_ranks, tmp_path):
    saved(tmp_path, "llama")
    [(loss, logits)] = on_ranks(1, evaluation, STOCK, tmp_path, {})
    for found_loss, found_logits in on_ranks(4, evaluation, 2, tmp_path, TP_CP):
        np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(found_logits, logits, rtol=1e-4, atol=1e-5)


def shapes(folder, sequence_parallel) -> tuple[set[int], int, torch.Tensor, torch.Tensor]:
    """Return the tokens that norms see, the bytes that a layer saves outside of regions, and the gathered logits."""
    model = tensor_parallel_model(folder, dtype=torch.float32, **TP_CP)
    settings = hcp.ContextParallelConfig(size=2, sequence_parallel=sequence_parallel)
    cp = hcp.ContextParallel(settings, hcp.mesh_of(model))
    layer = model.model.layers[1]
    tokens_seen, saved_bytes, inside = set(), [], []
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.register_forward_pre_hook(lambda _, args: tokens_seen.add(args[0].shape[1]))
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.register_forward_pre_hook(lambda *_: inside.append(True))
        norm.register_forward_hook(lambda *_: inside.clear())

    def pack(x):
        if inside and x.dim() == 3:
            saved_bytes.append(x.numel() * x.element_size())
        return x

    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with cp.shard(inputs, model) as local, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = cp.gather(model(**local).logits)
    return tokens_seen, sum(saved_bytes), logits.detach()


def test_sequence_parallelism_divides_what_norms_see_and_save_by_the_tp_size(on_ranks, tmp_path):
    folder = saved(tmp_path, "llama")
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    # 45 tokens are 48 with the layout's padding, of which a rank holds 24 and its TP group 12 each.
    whole_rows = on_ranks(4, shapes, folder, False)
    shared_rows = on_ranks(4, shapes, folder, True)
    for (seen, size, logits), (fewer_seen, less, same_logits) in zip(whole_rows, shared_rows):
        assert seen == {24} and fewer_seen == {12}
        assert less * 2 == size > 0
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(same_logits[real], expected[real], rtol=1e-4, atol=1e-5)


def drawn(folder, sequence_parallel) -> float:
    """Return a random number drawn while a model is trained."""
    model = tensor_parallel_model(folder, dtype=torch.float32, **TP_CP).train()
    settings = hcp.ContextParallelConfig(size=2, sequence_parallel=sequence_parallel)
    cp = hcp.ContextParallel(settings, hcp.mesh_of(model))
    numbers = []
    model.model.layers[0].register_forward_hook(lambda *_: numbers.append(float(torch.rand(()))))
    torch.manual_seed(0)
    with cp.shard(batch(), model) as local:
        model(**local)
    return numbers[0]


def test_dropout_is_the_same_where_tokens_are_and_differs_where_they_do(on_ranks, tmp_path):
    folder = saved(tmp_path, "llama")
    # Ranks 0 and 1 are a TP group, whose ranks hold the same tokens, unless sequence parallelism divides them.
    first, second, third, fourth = on_ranks(4, drawn, folder, False)
    assert first == second and third == fourth and first != third
    assert len(set(on_ranks(4, drawn, folder, True))) == 4


def verified(folder, settings) -> list[tuple[str, str]]:
    model = tensor_parallel_model(folder, dtype=torch.float32, **TP_CP)
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2, **settings), hcp.mesh_of(model))
    return [(found.layer, found.tensor) for found in hcp.verify(model, cp)]


@pytest.mark.parametrize("settings", [{}, {"sequence_parallel": True}], ids=["", "sequence parallel"])
def test_layers_are_verified(on_ranks, tmp_path, settings):
    for found in on_ranks(4, verified, saved(tmp_path, "llama"), settings):
        for layer in range(2):
            assert (f"model.layers.{layer}", "output") in found
            assert (f"model.layers.{layer}.self_attn", "input gradient") in found


def refusal(folder, settings, sizes, with_mesh=True) -> str:
    try:
        model = tensor_parallel_model(folder, dtype=torch.float32, **sizes)
        cp = hcp.ContextParallel(hcp.ContextParallelConfig(**settings), hcp.mesh_of(model) if with_mesh else None)
        with cp.shard(batch(), model):
            pass
    except ValueError as caught:
        return str(caught)
    return "nothing was refused"


REFUSED = {
    "CP does not divide": (
        "llama",
        {"size": 4},
        TP_CP,
        "size=4 does not divide the mesh dimension 'fsdp', which is 2",
    ),
    "nothing to shard over": (
        "llama",
        {"size": 2, "sequence_parallel": True},
        {"fsdp_size": 4},
        "sequence_parallel=True shards activations over the ranks of tensor parallelism, and there is none",
    ),
    "a flag that nothing reads": (
        "llama",
        {"size": 2},
        {**TP_CP, "enable_sequence_parallel": True},
        "Set ContextParallelConfig(sequence_parallel=True), which does it",
    ),
    "heads that are cut": (
        "llama",
        {},
        {"tp_size": 4},
        "tp_size=4 does not divide num_key_value_heads=2",
    ),
    "experts": (
        "qwen3_moe",
        {"size": 2, "sequence_parallel": True},
        TP_CP,
        "sequence_parallel=True: Qwen3MoeForCausalLM has Qwen3MoeDecoderLayer.mlp",
    ),
    "a type that is wrong": ("apertus", {"size": 2}, TP_CP, "model type 'apertus' is refused with tensor parallelism"),
    "a plan of one's own": (
        "llama",
        {"size": 2},
        {**TP_CP, "tp_plan": {"model.layers.*.mlp.up_proj": "colwise_gather_output"}},
        "Leave tp_plan out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused_on_every_rank_alike(on_ranks, tmp_path, case):
    model_type, settings, sizes, message = REFUSED[case]
    answers = on_ranks(4, refusal, saved(tmp_path, model_type), settings, sizes)
    assert message in answers[0] and len(set(answers)) == 1


def test_a_mesh_that_is_not_given_is_asked_for(on_ranks, tmp_path):
    for found in on_ranks(4, refusal, saved(tmp_path, "llama"), {"size": 2}, TP_CP, False):
        assert "ContextParallel(config, mesh=hf_context_parallel.mesh_of(model))" in found


@pytest.fixture(scope="module")
def on_eight_ranks():
    workers = WorkerPool(8, 240)
    yield workers
    workers.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", [{}, {"sequence_parallel": True}], ids=["", "sequence parallel"])
@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (2, {"tp_size": 4, "fsdp_size": 2}),
        (2, {"tp_size": 2, "fsdp_size": 4}),
        (4, {"tp_size": 2, "fsdp_size": 4}),
        (2, {"tp_size": 2, "fsdp_size": 2, "dp_replicate_size": 2}),
        (4, {"tp_size": 2, "fsdp_size": 1, "dp_replicate_size": 4}),
    ],
)
def test_eight_processes_give_the_losses_of_one(on_ranks, on_eight_ranks, tmp_path, size, sizes, settings):
    saved(tmp_path, "qwen3", num_key_value_heads=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3")
    options = {"gradient_accumulation_steps": 2, "collator": "packed"}
    [expected] = on_ranks(1, history, STOCK, tmp_path, {"model": model, **options})
    for found in on_eight_ranks(8, trained, size, tmp_path, "qwen3", settings, sizes, options):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
