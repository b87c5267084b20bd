"""Modules that run on one tile at a time: gradients are those of one process, and tiles are all that exists."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hf_context_parallel as hcp
from hf_context_parallel.integration import tiles
from hf_context_parallel.integration.tiles import is_norm, modules_by_token
from tests.helpers.border import batch_for, differences, mean_gradients, model_with
from tests.helpers.models import (
    context,
    document_positions,
    error,
    labelled,
    needs_sharding_while_loading,
    some_labels,
    tiny_model,
    tokens,
)
from tests.helpers.tensor_parallel import TP_CP, batch, saved, tensor_parallel_model
from tests.helpers.tiles import CONTEXTS, unrounded_tiles

NOT_REENTRANT = {"use_reentrant": False, **CONTEXTS}


def errors_with_tiles(model_type: str, changes: dict, checkpointing: str | None, given: dict, size: int) -> float:
    """Compare a model that runs on tiles with one process: outputs, and the gradients of all parameters."""
    names = (None, "context_parallel")
    # Some routers are made in float32.
    whole, sharded = (model_with("causal", model_type, name, **changes).double().train() for name in names)
    hcp.parallelize(sharded, context(tile_tokens=size))
    if checkpointing is not None:
        sharded.gradient_checkpointing_enable(
            {"use_reentrant": True} if checkpointing == "reentrant" else NOT_REENTRANT
        )
    with unrounded_tiles():
        expected, found = whole(**given), sharded(**given)
        expected.loss.backward()
        found.loss.backward()
        worst = differences(found, expected)
        gradients = zip(mean_gradients(sharded), whole.parameters())
        worst = max(worst, *(error(mine, theirs.grad) for mine, theirs in gradients if theirs.grad is not None))
        whole.eval(), sharded.eval()
        with torch.no_grad():
            return max(worst, differences(sharded(**given), whole(**given)))


PACKED = {
    "input_ids": tokens(1, 31),
    "labels": some_labels(tokens(1, 31)).masked_fill(document_positions(7, 1, 20, 3) == 0, -100),
    "position_ids": document_positions(7, 1, 20, 3),
}
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
CASES = {
    "an MLP": ("llama", {}, None, labelled()),
    "padding": ("llama", {}, "not reentrant", batch_for("causal")),
    "reentrant": ("gpt2", {}, "reentrant", labelled()),
    "experts": ("qwen3_moe", ROUTED, None, labelled()),
    "experts with checkpoints": ("mixtral", ROUTED, "not reentrant", labelled()),
    "experts beside an MLP": ("deepseek_v3", {}, "not reentrant", labelled()),
    "sinks": ("gpt_oss", {}, None, labelled()),
    "a state space": ("nemotron_h", {}, None, labelled()),
    "a scan": ("qwen3_next", {}, None, labelled()),
}
SIMPLER = {"an MLP", "experts", "sinks", "a state space", "a scan"}
"""Cases that make test-all runs alone."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.exhaustive] * (case in SIMPLER)) for case in CASES]
)
def test_models_on_tiles_are_those_of_one_process(on_ranks, case):
    """The router logits that Transformers records, and their auxiliary loss, are compared too."""
    assert max(on_ranks(3, errors_with_tiles, *CASES[case], 3)) < 1e-10


@pytest.mark.parametrize("size", [1, 5, pytest.param(100, marks=pytest.mark.exhaustive)])
def test_tiles_of_any_size_are_exact_on_one_rank(size):
    assert errors_with_tiles("llama", {}, None, labelled(), size) < 1e-10


def what_exists(size: int | None, checkpointing: dict | None) -> tuple[int, int]:
    """Train a step, and count.

    Returns:
        The largest number of tokens that a linear layer inside of an MLP was given, and the number of values between
        these layers that autograd has saved when forward ends.
    """
    seen, kept = [], []
    model = model_with("causal", "llama", "context_parallel", intermediate_size=72).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1].numel()))
    hcp.parallelize(model, context(tile_tokens=size))

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1:] == (72,) and not isinstance(x, torch.nn.Parameter):
            kept.append(x.shape[:-1].numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**labelled(3, 40)).loss
    loss.backward()
    return max(seen), sum(kept)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_what_lies_inside_of_a_module_exists_for_one_tile(on_ranks, checkpointing):
    """A rank holds 3 rows of 20 tokens. Forward, and backward, which computes each tile again, see 8 at most."""
    for (all_tokens, kept), (of_tiles, kept_of_tiles) in zip(
        on_ranks(2, what_exists, None, checkpointing), on_ranks(2, what_exists, 8, checkpointing)
    ):
        assert all_tokens == 60 and of_tiles == 8
        assert kept_of_tiles == 0 and (kept > 0) == (checkpointing is None)


# Which modules


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_keeps_no_input_of_its_module(reentrant):
    model = hcp.parallelize(model_with("causal", "qwen3", "context_parallel").train(), context(tile_tokens=5))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: inputs.append(weakref.ref(given[0].untyped_storage())))
    loss = model(**batch_for("causal")).loss
    assert len(inputs) == len(model.model.layers) and not any(x() is not None for x in inputs)
    loss.backward()


@pytest.mark.parametrize("size", [3, 4, 8])
def test_outputs_that_are_as_wide_as_a_tile_is_long(size):
    changes = {"num_local_experts": 4, "output_router_logits": True}
    whole, tiled = (model_with("causal", "mixtral", name, **changes) for name in (None, "context_parallel"))
    hcp.parallelize(tiled, context(tile_tokens=size))
    given = labelled(1, 32)
    found, expected = tiled(**given), whole(**given)
    assert differences(found, expected) < 1e-6
    assert found.router_logits[0].shape == expected.router_logits[0].shape == (32, 4)


def names_of(model_type: str) -> set[str]:
    found = modules_by_token(tiny_model(model_type, None).base_model)
    return {type(module).__name__ for module in found if not is_norm(module)}


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", {"LlamaMLP"}),
        ("gpt2", {"GPT2MLP"}),
        ("qwen3_moe", {"Qwen3MoeSparseMoeBlock"}),
        ("nemotron_h", {"NemotronHMLP", "NemotronHMoE"}),
        ("qwen3_next", {"Qwen3NextSparseMoeBlock", "Qwen3NextMLP"}),
        ("falcon", {"FalconMLP"}),
        ("rwkv", set()),
        ("opt", set()),
    ],
)
def test_modules_that_mix_tokens_and_linear_layers_have_no_tiles(model_type, names):
    """The feed-forward of RWKV reads the token before. The layers of OPT call two linear layers themselves."""
    found = names_of(model_type)
    assert found == names or (model_type == "qwen3_next" and "Qwen3NextSparseMoeBlock" in found <= names)


@pytest.mark.parametrize(
    ("model_type", "norms"),
    [("llama", ["norm", "input_layernorm", "post_attention_layernorm"]), ("gpt2", ["ln_f", "ln_1", "ln_2"])],
)
def test_norms_of_hidden_states_run_on_tiles(model_type, norms):
    """Those inside of attention, as in Qwen3's, are of heads, and run on all tokens."""
    decoder = tiny_model(model_type, None).base_model
    names = {module: name.rpartition(".")[2] for name, module in decoder.named_modules()}
    found = [names[module] for module in modules_by_token(decoder) if is_norm(module)]
    assert sorted(found) == sorted([norms[0], *norms[1:] * decoder.config.num_hidden_layers])


def gradients_in_bfloat16(size: int | None, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Gradients of the MLPs and of the norms of hidden states, of weights in bfloat16 that are computed in `dtype`."""
    model = model_with("causal", "llama", "context_parallel").to(torch.bfloat16).to(dtype).train()
    hcp.parallelize(model, context(tile_tokens=size))
    model(**labelled(4, 256)).loss.backward()
    return {name: x.grad.double() for name, x in model.named_parameters() if "mlp" in name or "norm" in name}


def test_gradients_of_many_tiles_are_rounded_as_those_of_one_piece():
    """Compare 512 tiles, whose sum in bfloat16 would be off by several times as much."""
    truth = gradients_in_bfloat16(None, torch.float64)
    errors = {
        size: sum((x - truth[name]).square().sum() / truth[name].square().sum() for name, x in found.items())
        for size, found in ((size, gradients_in_bfloat16(size)) for size in (None, 2))
    }
    assert errors[2] < 1.3 * errors[None]


@pytest.mark.parametrize(("size", "wide"), [(None, True), (8, False)])
def test_a_norm_keeps_its_input_in_float32_unless_it_runs_on_tiles(size, wide):
    model = model_with("causal", "llama", "context_parallel").to(torch.bfloat16).train()
    hcp.parallelize(model, context(tile_tokens=size))
    held, of_norm = [], []
    model.model.norm.register_forward_pre_hook(lambda *_: held.clear())
    model.model.norm.register_forward_hook(lambda *_: of_norm.extend(held))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.dtype) or x, lambda x: x):
        model(**labelled(1, 32))
    assert (torch.float32 in of_norm) == wide


class WholeTensors(TorchDispatchMode):
    """Counts the tensors of a size that operators make: views of others do not count."""

    def __init__(self, size: int):
        super().__init__()
        self._size, self.count = size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.count += isinstance(made, torch.Tensor) and made._base is None and made.numel() == self._size
        return made


def whole_tensors_of_backward(size: int) -> int:
    """Count the tensors that backward of a model makes in the size of its hidden states."""
    model = model_with("causal", "llama", "context_parallel").train()
    hcp.parallelize(model, context(tile_tokens=size))
    batch = labelled(1, 64)
    loss = model(**batch).loss
    with WholeTensors(64 * model.config.hidden_size) as whole:
        loss.backward()
    return whole.count


def test_backward_makes_no_whole_tensor_for_each_tile():
    few, many = (whole_tensors_of_backward(size) for size in (32, 4))
    assert many <= few


def test_a_model_without_such_modules_is_refused():
    with pytest.raises(ValueError, match="tile_tokens: OPTDecoder has no MLP and no mixture of experts"):
        hcp.parallelize(model_with("causal", "opt", "context_parallel"), context(tile_tokens=4))


class WithMean(torch.nn.Module):
    """MLP that returns a mean over tokens beside its output."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states):
        output = self.inner(hidden_states)
        return output, output.mean()


def test_what_is_no_value_of_a_token_is_refused():
    model = model_with("causal", "llama", "context_parallel")
    model.model.layers[0].mlp = WithMean(model.model.layers[0].mlp)
    hcp.parallelize(model, context(tile_tokens=4))
    with pytest.raises(ValueError, match=r"tile_tokens: WithMean returns a tensor of shape \(\) for a tile"):
        model(**labelled())


class ByMask(torch.nn.Module):
    """MLP that is given a tensor that has no entry for each token."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, scale):
        return self.inner(hidden_states) * scale


def test_a_module_that_is_given_another_tensor_runs_on_all_tokens(caplog):
    model = model_with("causal", "llama", "context_parallel")
    layer, seen = model.model.layers[0], []
    layer.mlp = ByMask(layer.mlp)
    layer.mlp.inner.gate_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    hcp.parallelize(model, context(tile_tokens=4))
    forward, scale = layer.mlp.forward, torch.ones(32, dtype=torch.float64)
    layer.mlp.forward = lambda hidden_states: forward(hidden_states, scale)
    model(**labelled())
    assert seen == [20] and "tile_tokens: ByMask is given tensors" in caplog.text


# Beside other libraries


def error_under_fsdp(model_type: str, wrapped: tuple[str, ...], groups: int) -> float:
    """Compare gradients under FSDP2 with one process. Each CP group has another batch, of another length."""
    whole, model = (model_with("causal", model_type, name).train() for name in (None, "context_parallel"))
    for layer in model.model.layers:
        for name in wrapped:
            fully_shard(layer.get_submodule(name))
        fully_shard(layer)
    fully_shard(model)
    model.gradient_checkpointing_enable(NOT_REENTRANT)
    size = torch.distributed.get_world_size() // groups
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size, tile_tokens=4))
    hcp.parallelize(model, cp)
    batches = [labelled(2, 19 + 20 * number, seed=number) for number in range(groups)]
    with unrounded_tiles():
        for number in range(2):  # gradients are accumulated
            losses = [whole(**batch).loss for batch in batches]
            (sum(losses) / groups).backward()
            found = model(**batches[cp.groups.data_rank]).loss
            found.backward()
            assert error(found, losses[cp.groups.data_rank]) < 1e-10, number
    gradients = zip(model.parameters(), whole.parameters())
    return max(error(a.grad.full_tensor() if isinstance(a.grad, DTensor) else a.grad, b.grad) for a, b in gradients)


@pytest.mark.parametrize(
    ("model_type", "wrapped", "ranks"),
    [
        pytest.param("llama", (), 2, marks=pytest.mark.exhaustive),
        pytest.param("llama", ("mlp",), 4, marks=pytest.mark.exhaustive),
        ("llama", ("mlp.gate_proj", "mlp"), 4),
        ("qwen3_moe", ("mlp.experts",), 4),
    ],
)
def test_fsdp2_around_and_inside_of_modules(on_ranks, model_type, wrapped, ranks):
    """Ranks of both CP groups gather parameters inside of a module equally often, though one has fewer tokens."""
    assert max(on_ranks(ranks, error_under_fsdp, model_type, wrapped, ranks // 2)) < 1e-10


def error_with_adapters() -> float:
    """Compare LoRA inside of MLPs with one process, with gradient checkpointing as the Trainer switches it on."""
    from peft import LoraConfig, get_peft_model

    models = []
    for name in (None, "context_parallel"):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False)
        models.append(get_peft_model(model_with("causal", "llama", name), config).double().train())
    whole, model = models
    hcp.parallelize(model, context(tile_tokens=4))
    model.gradient_checkpointing_enable(NOT_REENTRANT)
    model.enable_input_require_grads()
    with unrounded_tiles():
        for each in models:
            each(**labelled()).loss.backward()
    pairs = zip(mean_gradients(model), whole.parameters())
    return max(error(mine, theirs.grad) for mine, theirs in pairs if theirs.grad is not None)


def test_adapters_inside_of_tiles_are_exact(on_ranks):
    assert max(on_ranks(2, error_with_adapters)) < 1e-10


def with_tensor_parallelism(folder, settings: dict) -> tuple[list[torch.Tensor], int]:
    """Return loss and gradients of a model on 2 x 2 ranks, and the largest number of tokens that an MLP saw."""
    model, seen = tensor_parallel_model(folder, **TP_CP).train(), []
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the default one has no float64
    config = hcp.ContextParallelConfig(size=2, **settings)
    hcp.parallelize(model, hcp.ContextParallel(config, hcp.mesh_of(model)))
    model.gradient_checkpointing_enable(NOT_REENTRANT)
    experts = [module for name, module in model.named_modules() if name.endswith(("act_fn", "experts"))]
    for module in experts:
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    with unrounded_tiles():
        loss = model(**batch()).loss
        loss.backward()
    gradients = [x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad for x in model.parameters()]
    return [loss.detach(), *gradients], max(seen)


@needs_sharding_while_loading
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        pytest.param("llama", {}, marks=pytest.mark.exhaustive, id="MLPs"),
        pytest.param("llama", {"sequence_parallel": True}, id="sequence parallel"),
        pytest.param("mixtral", {}, marks=pytest.mark.exhaustive, id="experts"),
    ],
)
def test_tensor_parallelism_with_tiles_is_exact(on_ranks, tmp_path, model_type, settings):
    """Without tiles an MLP sees 2 rows of 24 tokens. Sequence parallelism gathers a tile from two ranks."""
    folder = saved(tmp_path, model_type, torch.float64)
    whole = on_ranks(4, with_tensor_parallelism, folder, settings)
    for (found, seen), (expected, of_all) in zip(
        on_ranks(4, with_tensor_parallelism, folder, {**settings, "tile_tokens": 10}), whole
    ):
        assert seen == 10 and of_all == 48
        assert max(error(a, b) for a, b in zip(found, expected)) < 1e-10


def dropped(computed_again: bool) -> list[torch.Tensor]:
    """Return loss and gradients of a model with dropout inside of its MLPs."""
    model = model_with("causal", "gpt2", "context_parallel", resid_pdrop=0.3, attn_pdrop=0.1).train()
    hcp.parallelize(model, context(tile_tokens=4))
    torch.manual_seed(5)
    if not computed_again:
        tiles.checkpoint = lambda function, *args, **options: function(*args)
    try:
        loss = model(**labelled()).loss
        loss.backward()
    finally:
        tiles.checkpoint = checkpoint
    return [loss.detach(), *mean_gradients(model)]


def test_a_tile_that_is_computed_again_drops_the_same(on_ranks):
    pairs = zip(on_ranks(2, dropped, True), on_ranks(2, dropped, False))
    for found, expected in pairs:
        assert max(error(a, b) for a, b in zip(found, expected)) < 1e-12


# The self-check


def lengths_of_a_check() -> tuple[list[str], set[int]]:
    """Verify a model whose tiles are longer than the batches of the check."""
    model, seen = tiny_model("llama", "context_parallel"), set()
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda module, args: seen.add(args[0].shape[1]))
    return [difference.layer for difference in hcp.verify(model, context(tile_tokens=4096))], seen


def test_the_self_check_runs_on_tiles(on_ranks):
    plain, with_tiles = on_ranks(2, lengths_of_a_check)
    assert plain == with_tiles and len(plain[1]) > 1


def losses_in_the_block() -> float:
    """Compare the block of `cp.shard` with tiles and without."""
    results = []
    for size in (None, 4):
        model, cp = model_with("causal", "gpt2", "context_parallel").train(), context(tile_tokens=size)
        with cp.shard(labelled(), model) as local:
            loss = model(**local).loss
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in model.parameters())])
    return max(error(a, b) for a, b in zip(*results))


def test_the_block_of_shard_runs_on_tiles(on_ranks):
    assert max(on_ranks(2, losses_in_the_block)) < 1e-10
