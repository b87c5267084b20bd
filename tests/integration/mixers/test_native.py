"""Native mixers: the exchanges alone, then models of each family against one process."""

from __future__ import annotations

import importlib

import pytest
import torch

from hf_context_parallel.integration.mixers.native import NativePatch
from hf_context_parallel.integration.model_registry import NAME
from hf_context_parallel.integration.switches import allow_unchecked_models
from hf_context_parallel.verification.types.check import Errors, batches, errors
from hf_context_parallel.verification.types.tiny import tiny_config, tiny_model
from tests.helpers.mixers import dense
from tests.helpers.models import context

FAMILIES = {
    "delta rule": "qwen3_next",
    "delta rule of channels": "kimi_linear",
    "state space": "nemotron_h",
    "state space in parallel with attention": "falcon_h1",
    "short convolution": "lfm2",
}
FEW_HEADS = {
    "qwen3_next": {"linear_num_value_heads": 2, "linear_num_key_heads": 1},
    "nemotron_h": {"mamba_num_heads": 2, "n_groups": 1},
}
"""Fewer heads than ranks, in groups that several ranks share."""


def families() -> list:
    """Make test parameters of the families. The one that joins two of the others is for make test-all alone."""
    return [
        pytest.param(model_type, id=family, marks=[pytest.mark.exhaustive] * (model_type == "falcon_h1"))
        for family, model_type in FAMILIES.items()
    ]


def errors_of_type(model_type: str, changes: dict) -> tuple[dict[str, Errors], dict[str, list[str]]]:
    return errors(tiny_config(model_type, **changes), {})


def check(results, how: str) -> None:
    for by_batch, handled in results:
        for batch, (loss, gradients, parameter) in by_batch.items():
            assert loss < 1e-6, (batch, loss)
            assert gradients < 1e-6, (batch, gradients, parameter)
        assert [how] in handled.values() and ["whole sequences"] not in handled.values()


@pytest.mark.parametrize(
    "ranks", [pytest.param(2, marks=pytest.mark.exhaustive), 3, pytest.param(4, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("model_type", families())
def test_families_are_exact(on_ranks, model_type, ranks):
    check(on_ranks(ranks, errors_of_type, model_type, {}), "halo" if model_type == "lfm2" else "heads")


@pytest.mark.parametrize("model_type", [pytest.param("qwen3_next", marks=pytest.mark.exhaustive), "nemotron_h"])
def test_fewer_heads_than_ranks_are_exact(on_ranks, model_type):
    check(on_ranks(4, errors_of_type, model_type, FEW_HEADS[model_type]), "heads")


def gradients_of(model, cp, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    with allow_unchecked_models(), cp.shard(batch, model) as local:
        model(**local).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def difference_by_checkpointing(model_type: str, reentrant: bool, changes: dict) -> float:
    cp, model = context(), tiny_model(tiny_config(model_type, **changes), NAME)
    batch = batches(model.config)["packed"]
    expected = gradients_of(model, cp, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients_of(model, cp, batch)
    assert all((a is None) == (b is None) for a, b in zip(found, expected))
    return max((a - b).abs().max().item() for a, b in zip(found, expected) if a is not None)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("model_type", families())
def test_checkpointing_changes_nothing(on_ranks, model_type, reentrant):
    assert max(on_ranks(3, difference_by_checkpointing, model_type, reentrant, FEW_HEADS.get(model_type, {}))) < 1e-12


def gradients_around_another_batch(model_type: str) -> float:
    cp, model = context(), tiny_model(tiny_config(model_type), NAME)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    one, other = (batches(model.config)[kind] for kind in ("dense", "packed"))
    expected = gradients_of(model, cp, one)
    model.zero_grad(set_to_none=True)
    with allow_unchecked_models(), cp.shard(one, model) as local:
        model(**local)  # replaced once, however often it is called
        loss = model(**local).loss
        with torch.no_grad(), cp.shard(other, model) as inner:
            model(**inner)
        loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    return max((a - b).abs().max().item() for a, b in zip(found, expected) if a is not None)


def test_batches_nest(on_ranks):
    assert max(on_ranks(2, gradients_around_another_batch, "qwen3_next")) == 0


def test_unknown_arguments_of_a_mixer_fall_back_to_whole_sequences():
    model = tiny_model(tiny_config("qwen3_next"), NAME)
    mixer = next(module for module in model.modules() if type(module).__name__ == "Qwen3NextGatedDeltaNet")
    sharding = context().shard(dense(16), model)
    with allow_unchecked_models(), torch.no_grad(), sharding as local:
        model(**local)
        hidden = torch.randn(1, 16, model.config.hidden_size, dtype=torch.float64)
        expected = mixer(hidden_states=hidden)
        assert sharding.handled[type(mixer).__name__] == {"heads"}
        found = mixer(hidden_states=hidden, attention_mask=torch.ones(1, 16))
        assert sharding.handled[type(mixer).__name__] == {"heads", "whole sequences"}
    assert torch.allclose(found, expected)


def test_a_replaced_forward_is_refused():
    model = tiny_model(tiny_config("qwen3_next"), NAME)
    mixer = next(module for module in model.modules() if type(module).__name__ == "Qwen3NextGatedDeltaNet")
    mixer.forward = lambda hidden_states, attention_mask=None, **_: hidden_states  # as a kernel for all of it would
    with (
        allow_unchecked_models(),
        context().shard(dense(16), model) as local,
        pytest.raises(RuntimeError, match="did not"),
    ):
        model(**local)


@pytest.mark.parametrize("function", ["causal_conv1d_fn", "torch_chunk_gated_delta_rule"])
def test_an_error_leaves_nothing_replaced(function, monkeypatch):
    model = tiny_model(tiny_config("qwen3_next"), NAME)
    modeling = importlib.import_module(type(model).__module__)

    def broken(*_, **__):
        raise ArithmeticError("broken")

    before = dict(vars(modeling))
    monkeypatch.setattr(modeling, function, broken)
    with pytest.raises(ArithmeticError), allow_unchecked_models(), context().shard(dense(16), model) as local:
        model(**local)
    assert {**vars(modeling), function: before[function]} == before


def torch_chunk_gated_delta_rule(query, key, value, g, beta, **options):
    return value, None


class OwnMixer(torch.nn.Module):
    """A mixer that calls a scan with the given options."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, hidden_states):
        x = hidden_states.unflatten(-1, (4, -1))
        return torch_chunk_gated_delta_rule(x, x, x, x[..., 0], x[..., 0], **self.options)[0].flatten(-2)


@pytest.mark.parametrize(
    "options", [{"initial_state": torch.zeros(1)}, {"output_final_state": True}, {"seq_idx": torch.zeros(1)}]
)
def test_unknown_arguments_of_a_scan_are_refused(options):
    original, hidden = torch_chunk_gated_delta_rule, torch.randn(1, 16, 8)
    sharding, mixer, known = context().shard(dense(16)), OwnMixer(**options), OwnMixer(chunk_size=4, seq_idx=None)
    with sharding:
        native = NativePatch()
        native.replace(mixer)
        native.replace(known)
        assert torch.equal(known(hidden), hidden)
        with pytest.raises(ValueError, match=next(iter(options))):
            mixer(hidden)
        assert torch_chunk_gated_delta_rule is original
        native.restore()
    assert "forward" not in vars(mixer)
