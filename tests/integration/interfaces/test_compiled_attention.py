"""Compiled models on ranks against the same models on one process, which are not compiled."""

from __future__ import annotations

import gc

import pytest
import torch

import hf_context_parallel as hcp
from hf_context_parallel.integration.interfaces import compiled_attention
from tests.helpers.border import batch_for, errors_of, mean_gradients, model_with
from tests.helpers.models import context, error, labelled

CASES = {
    "rows": ("llama", {}, labelled(), {}),
    "sinks and windows, padding, all-to-all": ("gpt_oss", {}, batch_for("causal"), {"comm_type": "a2a"}),
    "a strategy a layer": ("qwen3", {}, labelled(), {"comm_type": ["p2p", "all_gather"]}),
    "softcaps": ("gemma2", {}, labelled(), {"comm_type": "all_gather"}),
    "a temperature that counts tokens": ("llama4_text", {"attention_chunk_size": 4}, labelled(), {}),
    "values of another head dim": ("deepseek_v3", {}, labelled(), {}),
    "blocks of images": ("gemma3", {}, labelled() | {"token_type_ids": labelled()["input_ids"] % 2}, {}),
    "an encoder": ("modernbert", {}, None, {}),
}


def compiled(model: torch.nn.Module, backend: str = "aot_eager") -> None:
    """Compile a model in place if it uses our attention."""
    if model.config._attn_implementation == "context_parallel":
        torch._dynamo.reset()
        model.compile(backend=backend)


def compiled_errors(case: str) -> float:
    model_type, changes, batch, settings = CASES[case]
    return errors_of("masked" if batch is None else "causal", model_type, changes, batch, settings, compiled)


exhaustive = pytest.mark.exhaustive


@exhaustive
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_model_is_exact(on_ranks, case):
    assert max(on_ranks(2, compiled_errors, case)) < 2e-7  # routers compute in float32


@exhaustive
def test_a_compiled_model_is_exact_on_three_ranks(on_ranks):
    assert max(on_ranks(3, compiled_errors, "rows")) < 1e-7


def errors_of_two_batches(model_type: str, backend: str, checkpointed: bool, dropout: float) -> dict[str, float]:
    """Compare two batches that are in flight together, in a compiled model and in one that is not compiled.

    Returns:
        The largest error, and the numbers of calls that are held after the forward, of calls that are held at the end,
        and of batches that are held at the end.
    """
    models = [model_with("causal", model_type, "context_parallel", attention_dropout=dropout) for _ in range(2)]
    for model in models:
        hcp.parallelize(model.train(), context())
        if checkpointed:
            model.gradient_checkpointing_enable()
    compiled(models[0], backend)
    losses = []
    for model in models:
        torch.manual_seed(1)
        losses.append([model(**labelled(length=length)).loss for length in (19, 26)])
    waiting = len(compiled_attention.calls)
    for pair in losses:
        sum(pair).backward()
    gradients = (mean_gradients(model) for model in models)
    worst = max(error(a, b) for pairs in (zip(*losses), zip(*gradients)) for a, b in pairs)
    del losses, pair
    gc.collect()
    held = len(compiled_attention.calls), len(compiled_attention.batches)
    return dict(zip(("error", "waiting", "calls", "batches"), (worst, waiting, *held)))


@pytest.mark.parametrize(
    ("model_type", "backend", "checkpointed", "dropout", "waiting"),
    [
        pytest.param("gpt_oss", "aot_eager", False, 0.0, 4, marks=exhaustive),
        pytest.param("llama", "aot_eager", True, 0.5, 0, marks=exhaustive),
        pytest.param("llama", "inductor", False, 0.0, 4, marks=exhaustive),
        pytest.param("llama", "inductor", True, 0.0, 0, marks=exhaustive),
        pytest.param("gemma2", "aot_eager", True, 0.0, 0, marks=exhaustive),
        pytest.param("qwen3_next", "aot_eager", True, 0.0, 0, marks=exhaustive),
    ],
)
def test_batches_of_a_compiled_model_are_dropped(on_ranks, model_type, backend, checkpointed, dropout, waiting):
    """Two layers wait for the backward of two batches, unless checkpointing computes them again."""
    for result in on_ranks(2, errors_of_two_batches, model_type, backend, checkpointed, dropout):
        assert result.pop("error") < 1e-5
        assert result == {"waiting": waiting, "calls": 0, "batches": 0}


def backward_passes() -> tuple[float, str]:
    """Run backward twice, and after hooks have copied all saved tensors.

    Returns:
        The error of the gradients of two passes through one graph, compared with twice those of one pass, and the
        message about the copies.
    """
    model = model_with("causal", "llama", "context_parallel", num_hidden_layers=1).train()
    hcp.parallelize(model, context())
    compiled(model)
    loss = model(**labelled()).loss
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    worst = max(error(parameter.grad, 2 * first) for parameter, first in zip(model.parameters(), once))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        loss = model(**labelled()).loss
    with pytest.raises(RuntimeError) as refusal:
        loss.backward()
    return worst, str(refusal.value)


@pytest.mark.exhaustive
def test_backward_runs_twice_and_says_when_it_cannot_run(on_ranks):
    for worst, message in on_ranks(2, backward_passes):
        assert worst < 1e-12
        assert "hooks on saved tensors have copied all of them" in message
