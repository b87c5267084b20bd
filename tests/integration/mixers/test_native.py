"""Native mixers: the exchanges alone, then models of each family against one process."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.config import ContextParallelConfig
from hf_context_parallel.data.batch import SHARD
from hf_context_parallel.data.shard import Shard, shard_batch
from hf_context_parallel.distributed.token_exchange import deal_heads
from hf_context_parallel.integration.active_batch import active_batch
from hf_context_parallel.integration.mixers import halo, scan_heads
from hf_context_parallel.integration.mixers.native import NativeMixers
from hf_context_parallel.integration.mixers.resharding import sequences
from hf_context_parallel.integration.mixers.whole_sequences import WholeSequences
from hf_context_parallel.integration.model_registry import NAME
from hf_context_parallel.integration.switches import allow_unchecked_models
from hf_context_parallel.verification.types.check import Errors, batches, errors
from hf_context_parallel.verification.types.tiny import tiny_config, tiny_model
from tests.helpers.models import context, document_positions, needs_transformers, some_labels, tokens
from tests.helpers.simulated import Network, SimulatedExchange

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


class Ranks:
    """A process group simulated by threads, with an `all_to_all` between them."""

    def __init__(self, size: int):
        self.size = size
        self._sent: list[tuple[torch.Tensor, ...]] = [()] * size
        self._barrier = threading.Barrier(size, timeout=20)
        self._here = threading.local()

    def all_to_all(self, rows, sends, receives, _group):
        rank = self._here.rank
        self._sent[rank] = rows.split(sends)
        self._barrier.wait()
        received = [sent[rank] for sent in self._sent]
        self._barrier.wait()
        assert [len(part) for part in received] == receives
        return torch.cat(received).clone()

    def __call__(self, function: Callable[[int], object]) -> list:
        """Return the results of `function(rank)` for all ranks."""
        results: list = [None] * self.size

        def run(rank: int) -> None:
            self._here.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                self._barrier.abort()
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


@st.composite
def shards(draw) -> list[Shard]:
    """Draw the shards of a batch: rows of one sequence, or packed rows, with some documents of a single token."""
    size, layout = draw(st.integers(1, 5)), draw(st.sampled_from(["zigzag", "contiguous"]))
    if draw(st.booleans()):
        positions = document_positions(*draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)))
        batch = {"input_ids": tokens(1, positions.shape[1]), "position_ids": positions}
    else:
        batch = {"input_ids": tokens(draw(st.integers(1, 3)), draw(st.integers(1, 30)))}
    config = ContextParallelConfig(size=size, layout=layout)
    return [shard_batch(batch, config, rank)[SHARD] for rank in range(size)]


def local_part(x: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Return the tokens of a rank of `[B, S, ...]`. The padding of the layout is large, and must not matter."""
    padding = torch.full((x.shape[0], shard.layout.length - shard.length, *x.shape[2:]), 1e3, dtype=x.dtype)
    return torch.cat([x, padding], dim=1).index_select(1, shard.layout.positions(shard.rank))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same_on_shards(every: list[Shard], tensors: list[torch.Tensor], shared: list[torch.Tensor], compute, truth):
    """Assert that `compute(rank, local tensors, shared)` on all ranks gives `truth(tensors, shared)`, with gradients.

    Args:
        shared: parameters, whose gradients are summed over the ranks.
    """
    expected = truth(tensors, shared)
    weights = random(*expected.shape)
    gradients = torch.autograd.grad((expected * weights).sum(), [*tensors, *shared])
    ranks = Ranks(len(every))

    def run(rank: int):
        local = [local_part(x.detach(), every[rank]).requires_grad_() for x in tensors]
        own = [x.detach().clone().requires_grad_() for x in shared]
        output = compute(rank, local, own)
        real = every[rank].layout.positions(rank) < every[rank].length
        assert not output[:, ~real].any()
        mine = torch.autograd.grad((output * local_part(weights, every[rank]))[:, real].sum(), [*local, *own])
        return output, local_part(expected, every[rank]), real, mine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halo, "all_to_all", ranks.all_to_all)
        results = ranks(run)
    for shard, (output, right, real, mine) in zip(every, results):
        assert torch.allclose(output[:, real], right[:, real], rtol=1e-12, atol=1e-12)
        for found, whole in zip(mine, gradients[: len(tensors)]):
            assert torch.allclose(found[:, real], local_part(whole, shard)[:, real], rtol=1e-12, atol=1e-12)
            assert not found[:, ~real].any()
    for index, whole in enumerate(gradients[len(tensors) :], start=len(tensors)):
        assert torch.allclose(sum(mine[index] for *_, mine in results), whole, rtol=1e-12, atol=1e-11)


@given(shards(), st.integers(1, 5))
def test_convolution_with_halos_is_that_of_whole_sequences(every, width):
    rows, length, channels = every[0].batch_size, every[0].length, 3
    x, weight, bias = random(rows, length, channels), random(channels, 1, width), random(channels)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()

    def convolved(x, weight, bias):
        padded = torch.nn.functional.pad(x.transpose(1, 2), (width - 1, 0))
        return torch.nn.functional.conv1d(padded, weight, bias, groups=channels).transpose(1, 2)

    def truth(tensors, parameters):
        output = torch.zeros_like(x)
        for row, start, stop in sequences(every[0]):
            alone = convolved(tensors[0][row : row + 1, start:stop], *parameters)
            output = output.index_put((torch.tensor(row), torch.arange(start, stop)), alone[0])
        return output

    def compute(rank, local, parameters):
        geometry = halo.Halo(every[rank], width - 1, None, torch.device("cpu"))
        return geometry.trimmed(convolved(geometry.extended(local[0]), *parameters))

    assert_same_on_shards(every, [x], [weight, bias], compute, truth)


@given(shards(), st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(0, 6))
def test_scan_by_heads_is_that_of_whole_sequences(every, groups, ratio, turn):
    count, (rows, length) = groups * ratio, (every[0].batch_size, every[0].length)
    value, gate, key = random(rows, length, count, 2), random(rows, length, count), random(rows, length, groups, 2)
    scale = random(count)
    for tensor in (value, gate, key, scale):
        tensor.requires_grad_()

    def scanned(value, gate, key, scale):
        key = key.repeat_interleave(value.shape[-2] // max(1, key.shape[-2]), dim=-2)
        return (value * gate[..., None] * key).cumsum(-3) * scale[:, None]

    def truth(tensors, parameters):
        output = torch.zeros_like(value)
        for row, start, stop in sequences(every[0]):
            alone = scanned(*(x[row, start:stop] for x in tensors), *parameters)
            output = output.index_put((torch.tensor(row), torch.arange(start, stop)), alone)
        return output

    network = Network(len(every), 120.0)

    def compute(rank, local, parameters):
        shares = deal_heads(count, len(every), turn)
        mine = shares[rank]
        geometry = scan_heads.Heads(every[rank], SimulatedExchange(network, rank))
        whole = geometry.whole(local, shares)
        own = parameters[0][mine.start : mine.stop]
        parts = zip(*(x.split([sequence.length for sequence in geometry.sequences]) for x in whole))
        return geometry.sharded(torch.cat([scanned(*part, own) for part in parts]), shares)

    assert_same_on_shards(every, [value, gate, key], [scale], compute, truth)


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
@pytest.mark.parametrize("model_type", FAMILIES.values(), ids=FAMILIES)
def test_families_are_exact(on_ranks, model_type, ranks):
    check(on_ranks(ranks, errors_of_type, model_type, {}), "halo" if model_type == "lfm2" else "heads")


@pytest.mark.parametrize("model_type", FEW_HEADS)
def test_fewer_heads_than_ranks_are_exact(on_ranks, model_type):
    check(on_ranks(4, errors_of_type, model_type, FEW_HEADS[model_type]), "heads")


def dense(length: int) -> dict[str, torch.Tensor]:
    input_ids = tokens(1, length)
    return {"input_ids": input_ids, "labels": some_labels(input_ids)}


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


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES.values(), ids=FAMILIES)
def test_checkpointing_changes_nothing(on_ranks, model_type, reentrant):
    assert max(on_ranks(3, difference_by_checkpointing, model_type, reentrant, FEW_HEADS.get(model_type, {}))) < 1e-12


def shapes_given(model_type: str, function: str, batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """Return the shape of the first argument in every call of a function of the modeling file, on a shard."""
    model = tiny_model(tiny_config(model_type), NAME)
    modeling, cp = importlib.import_module(type(model).__module__), context()
    original, seen = getattr(modeling, function), []

    def recorded(first, *args, **kwargs):
        seen.append(tuple(first.shape))
        return original(first, *args, **kwargs)

    with (
        pytest.MonkeyPatch.context() as patch,
        torch.no_grad(),
        allow_unchecked_models(),
        cp.shard(batch, model) as local,
    ):
        patch.setattr(modeling, function, recorded)
        model(**local)
        assert getattr(modeling, function) is recorded  # what was replaced meanwhile has been put back
    return seen


@pytest.mark.parametrize(
    ("model_type", "function", "count"),
    [("kimi_linear", "chunk_kimi_delta_attention", 4), ("nemotron_h", "mamba2_chunk_scan", 8)],
)
def test_a_rank_scans_its_share_of_the_heads(on_ranks, model_type, function, count):
    for seen in on_ranks(4, shapes_given, model_type, function, dense(61)):
        assert seen and all(shape[:3] == (1, 61, count // 4) for shape in seen)


@needs_transformers("5.23", "Transformers 5.17 repeats shared keys before it calls the function")
def test_shared_keys_travel_once_where_shares_are_whole_groups(on_ranks):
    for seen in on_ranks(2, shapes_given, "qwen3_next", "torch_chunk_gated_delta_rule", dense(61)):
        assert seen and all(shape[:3] == (1, 61, 1) for shape in seen)  # of two, each of two heads


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_next"])
def test_a_rank_convolves_its_own_tokens_and_a_halo(on_ranks, model_type):
    for seen in on_ranks(4, shapes_given, model_type, "causal_conv1d_fn", dense(64)):
        assert seen and all(shape[0] == 1 and 16 < shape[2] <= 16 + 2 * 3 + 1 for shape in seen)


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
    assert not any("forward" in vars(module) for module in model.modules())
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
    assert not any("forward" in vars(module) for module in model.modules())


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
        batch = active_batch()
        native = NativeMixers(batch, WholeSequences(batch))
        native.replace(mixer)
        native.replace(known)
        assert torch.equal(known(hidden), hidden)
        with pytest.raises(ValueError, match=next(iter(options))):
            mixer(hidden)
        assert torch_chunk_gated_delta_rule is original
        native.restore()
    assert "forward" not in vars(mixer)
