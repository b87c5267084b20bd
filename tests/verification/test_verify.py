"""Tests of `verify`: it accepts exact models, names the first layer that is not exact, and changes no state."""

from __future__ import annotations

import random
import re
from contextlib import contextmanager

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, Qwen3Config, TrainerCallback

import hf_context_parallel as hcp
from hf_context_parallel.attention.kernels.reference import ReferenceKernel
from hf_context_parallel.cp_group import CPGroup
from hf_context_parallel.data import batch
from hf_context_parallel.integration import model_registry
from hf_context_parallel.integration.interfaces import attention
from hf_context_parallel.integration.mixers import recognise
from hf_context_parallel.integration.model_registry import NAME
from hf_context_parallel.planning import mask
from hf_context_parallel.trainer import mixin
from hf_context_parallel.verification import verify
from hf_context_parallel.verification.types import tiny
from tests.helpers.images import image_model
from tests.helpers.models import context, tiny_model, tokens
from tests.helpers.trainer import make_trainer

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# These types have: attention by the interface; experts; sinks; softcap and windows; a short convolution; linear
# attention; a state space model; no causal mask; learned positions that are counted; score biases; several states per
# token; recurrences; and attention that asks for the name of its implementation.
TYPES = (
    "llama",
    "qwen3_moe",
    "gpt_oss",
    "gemma2",
    "lfm2",
    "qwen3_next",
    "bamba",
    "bert",
    "opt",
    "bloom",
    "gemma3n_text",
    "rwkv",
    "falcon",
)


def tiny_of(model_type: str, dtype: torch.dtype = FLOAT32) -> torch.nn.Module:
    return tiny.tiny_model(tiny.tiny_config(model_type), NAME, dtype)


def differences_of_a_type(model_type: str, dtype: torch.dtype) -> list:
    return hcp.verify(tiny_of(model_type, dtype), context())


IN_BFLOAT16 = ("llama", "gemma2", "qwen3_next", "bert")
"""Types that make test verifies in bfloat16. It verifies the other ones in float32."""


@pytest.mark.parametrize(
    ("model_type", "ranks", "dtype"),
    [
        pytest.param(name, *of_dtype, marks=[pytest.mark.exhaustive] * ((name in IN_BFLOAT16) == is_float32))
        for name in TYPES
        for of_dtype, is_float32 in (((2, FLOAT32), True), ((3, BFLOAT16), False))
    ],
)
def test_models_that_are_exact_pass(on_ranks, model_type, ranks, dtype):
    differences = on_ranks(ranks, differences_of_a_type, model_type, dtype)
    assert differences == differences[:1] * ranks
    assert {difference.batch for difference in differences[0]} == {"packed", "padded"}


def test_models_in_float64_pass(on_ranks):
    """Their padding is masked by numbers that softmax, which eager attention computes in float32, can hold."""
    on_ranks(2, differences_of_a_type, "llama", torch.float64)


@pytest.mark.parametrize(
    "model_type", ["inkling2_text", pytest.param("inkling2_loop_text", marks=pytest.mark.exhaustive)]
)
def test_attention_to_earlier_layers_passes(on_ranks, model_type):
    """Run them in float32 alone: their routers stay in it whatever the dtype of the model."""
    differences = on_ranks(3, differences_of_a_type, model_type, FLOAT32)
    assert differences == differences[:1] * 3
    assert {difference.batch for difference in differences[0]} == {"packed", "padded"}


def differences_with_a_tower(model_type: str) -> list:
    return hcp.verify(image_model(model_type, NAME), context())


@pytest.mark.parametrize(
    "model_type", ["qwen3_vl", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("gemma3", "llava"))]
)
def test_models_with_towers_pass(on_ranks, model_type):
    first, second = on_ranks(2, differences_with_a_tower, model_type)
    assert first == second and {difference.batch for difference in first} == {"packed", "padded"}
    assert {"the whole model", "model.language_model.layers.1"} <= {difference.layer for difference in first}


def lora(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def fsdp(model: torch.nn.Module, **options) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def mixed_fsdp(model: torch.nn.Module) -> torch.nn.Module:
    return fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=BFLOAT16, reduce_dtype=FLOAT32))


def checkpointed(model: torch.nn.Module) -> torch.nn.Module:
    model.gradient_checkpointing_enable()
    return DistributedDataParallel(lora(model.train()))


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(model, backend="aot_eager")


def autocast(model: torch.nn.Module) -> torch.nn.Module:
    """Let a model compute in bfloat16, as accelerate does."""
    model.forward = torch.autocast("cpu", BFLOAT16)(model.forward)
    return model


WRAPPERS = {
    "autocast": autocast,
    "LoRA": lora,
    "DDP": DistributedDataParallel,
    "DDP of LoRA with checkpointing": checkpointed,
    "FSDP2": fsdp,
    "compiled": compiled,
    "FSDP2 in bfloat16": mixed_fsdp,
}


def wrapped_steps(wrapper: str, model_type: str) -> tuple[int, list[bool]]:
    """Compute gradients of a model that was verified before, and of one that was not.

    Returns:
        The number of comparisons, and for each parameter True if both gradients are bitwise equal.
    """
    grads = []
    cp = context()
    for verified in (True, False):
        model = WRAPPERS[wrapper](tiny_of(model_type).train())
        if verified:
            compared = hcp.verify(model, cp)
        input_ids = tokens(2, 24)
        with cp.shard({"input_ids": input_ids, "labels": input_ids}, model) as local:
            model(**local).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    local = [[getattr(grad, "_local_tensor", grad) for grad in some] for some in grads]
    return len(compared), [torch.equal(a, b) for a, b in zip(*local)]


@pytest.mark.parametrize("model_type", [pytest.param("llama", marks=pytest.mark.exhaustive), "lfm2"])
@pytest.mark.parametrize(
    "wrapper", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name == "compiled")) for name in WRAPPERS]
)
def test_wrapped_models_pass_and_train_as_if_nothing_had_been(on_ranks, wrapper, model_type):
    for compared, same in on_ranks(2, wrapped_steps, wrapper, model_type):
        assert compared == (15 if "FSDP2" in wrapper else 16)  # gradients of sharded models are not compared
        assert same and all(same)


def differences_of_a_classifier() -> list:
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(**sizes, **heads, pad_token_id=0, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="context_parallel")
    return hcp.verify(autocast(model), context())


def test_autocast_is_not_taken_for_a_fault(on_ranks):
    """Logits of bfloat16 and weights of float32: rounding is that of bfloat16."""
    [first, _] = on_ranks(2, differences_of_a_classifier)
    [loss] = [each for each in first if each.layer == "the whole model" and each.tensor == "loss"]
    assert 1e3 * torch.finfo(FLOAT32).eps < loss.found < loss.bound < 0.1


# Errors name the wrong layer


class Wrong(ReferenceKernel):
    """Kernel with a wrong scale of scores, or with gradients of the keys that are too large."""

    def __init__(self, scale: float = 1.0, gradient: float = 1.0):
        self._scale, self._gradient = scale, gradient

    def forward(self, query, key, value, segments, scores):
        return super().forward(query, key, value, segments, scores._replace(scale=self._scale * scores.scale))

    def backward(self, *args):
        query, key, value = super().backward(*args)
        return query, key * self._gradient, value


def one_token_short(batch, layer, index, *others, original=attention.sharded_attention) -> torch.Tensor:
    """Attention on shards whose window in the second layer is one token shorter."""
    *tensors, pattern, scaling, softcap, dropout = others
    if index == 1:
        pattern = pattern._replace(sliding_window=pattern.sliding_window - 1)
    return original(batch, layer, index, *tensors, pattern, scaling, softcap, dropout)


def own_positions(rotary, forward):
    """RoPE by the index of each token on this rank instead of its position."""
    return lambda x, position_ids: forward(x, torch.arange(x.shape[1]).expand(len(position_ids), -1))


def reads_neighbour(forward):
    """Forward of a layer whose tokens read the one before them."""
    return lambda x, *args, **kwargs: forward(x + x.roll(1, 1), *args, **kwargs)


@contextmanager
def made_wrong(how: str):
    """Make a model that is wrong within the block."""
    with pytest.MonkeyPatch.context() as patch:
        if how == "window":
            model = tiny_model("mistral", "context_parallel", FLOAT32, sliding_window=6)
            patch.setattr(attention, "sharded_attention", one_token_short)
        elif how in ("convolution", "state space", "positions"):
            model = tiny_of({"convolution": "lfm2", "state space": "bamba", "positions": "opt"}[how])
            where, name = (recognise, "MAKES_POSITIONS") if how == "positions" else (model_registry, "SEES_WHOLE")
            patch.setattr(where, name, re.compile("none"))
        elif how == "neighbour":
            model = image_model("llava", NAME)
            layer = model.model.language_model.layers[1]
            layer.forward = reads_neighbour(layer.forward)
        elif how == "expert":
            model = tiny_of("qwen3_next")
            patch.setattr(model_registry, "SEES_WHOLE", re.compile("none"))
        else:
            model = tiny_model("llama", "context_parallel", FLOAT32)
        if how == "documents":
            patch.setattr(batch, "_documents", lambda batch, rows, length: mask.whole_rows(rows, length))
        elif how in ("scale", "gradient"):
            patch.setattr(CPGroup, "kernel", lambda self, device: Wrong(**{how: 1.001}))
        elif how == "RoPE":
            rotary = model.model.rotary_emb
            rotary.forward = own_positions(rotary, rotary.forward)
        yield model


WRONG = {
    "window": "model.layers.1.self_attn is not exact on shards: for a packed batch, its output",
    "convolution": "model.layers.0 is not exact on shards: for a packed batch, its output",
    "state space": "model.layers.0 is not exact on shards: for a packed batch, its output",
    "expert": "model.layers.0 is not exact on shards: for a packed batch, its output",
    "positions": "model.decoder.layers.0 is not exact on shards: for a padded batch, its input",
    "neighbour": "model.language_model.layers.1 is not exact on shards: for a packed batch, its output",
    "documents": "model.layers.0.self_attn is not exact on shards: for a packed batch, its output",
    "scale": "model.layers.0.self_attn is not exact on shards: for a packed batch, its output",
    "gradient": "model.layers.0.self_attn is not exact on shards: for a packed batch, its input gradient",
    "RoPE": "model.layers.0.self_attn is not exact on shards: for a packed batch, its output",
}


def message_about(how: str) -> str:
    cp = context()
    with made_wrong(how) as model:
        try:
            hcp.verify(model, cp)
        except ValueError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize("how", WRONG)
def test_a_model_that_is_wrong_is_refused_on_all_ranks_alike(on_ranks, how):
    messages = on_ranks(2, message_about, how)
    assert WRONG[how] in messages[0]
    assert messages[0] == messages[1]


def message_of_one_wrong_rank() -> str:
    cp = context()
    model = tiny_model("llama", "context_parallel", FLOAT32)
    if cp.rank == 1:
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(ValueError) as caught:
        hcp.verify(model, cp)
    return str(caught.value)


def test_ranks_with_different_weights_raise_the_same(on_ranks):
    first, second = on_ranks(2, message_of_one_wrong_rank)
    assert first == second and "the ranks of the group have different weights" in first


def message_of_broken_weights(rank: int, check_batch: bool) -> str:
    """Verify a model with a weight of NaN on one rank, or on all for the rank -1."""
    cp = context(check_batch=check_batch)
    model = tiny_model("llama", "context_parallel", FLOAT32)
    if rank in (cp.rank, -1):
        model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError) as caught:
        hcp.verify(model, cp)
    return str(caught.value)


@pytest.mark.parametrize("check_batch", [True, False])
@pytest.mark.parametrize(("rank", "where"), [(1, "1 elements on rank 1"), (-1, "1 of its")])
def test_weights_that_are_not_finite_are_named_rather_than_their_layer(on_ranks, rank, where, check_batch):
    first, second = on_ranks(2, message_of_broken_weights, rank, check_batch)
    assert first == second
    assert first.startswith(f"model.layers.1.self_attn.k_proj.weight ({where}") and "verify" not in first


def test_a_model_that_cp_shard_refuses_is_refused():
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        hcp.verify(tiny_model("llama", "sdpa", FLOAT32), context())


# State stays unchanged


def state(model: torch.nn.Module) -> list:
    """Copy all state that must not change, in a form that compares bit by bit."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    attributes = [
        {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
        for module in model.modules()
    ]
    return [
        {name: None if value is None else value.detach().numpy().tobytes() for name, value in tensors.items()},
        attributes,
        torch.get_rng_state().tolist(),
        random.getstate(),
    ]


def changes(model_type: str, rope: dict | None) -> list[bool]:
    cp = context()
    config = tiny.tiny_config(model_type)
    if rope is not None:
        config.rope_parameters = rope
    model = tiny.tiny_model(config, "context_parallel", FLOAT32).train()
    model.get_input_embeddings().eval()
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)
    before = state(model)
    hcp.verify(model, cp)
    return [a == b for a, b in zip(before, state(model))]


HALF = [1.0] * 4
ROPE = {
    "llama": None,
    "phi3": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": HALF,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 1.0,
    },
    "lfm2": None,
}


@pytest.mark.parametrize("model_type", ROPE)
def test_weights_gradients_buffers_modes_and_random_numbers_stay(on_ranks, model_type):
    assert all(map(all, on_ranks(2, changes, model_type, ROPE[model_type])))


# In the Trainer


class Steps(TrainerCallback):
    """Callback that counts the steps of a Trainer."""

    def __init__(self):
        self.begun = 0

    def on_step_begin(self, *args, **kwargs):
        self.begun += 1


def steps_of_a_trainer(folder, verified: bool, how: str | None, evaluate: bool = False) -> tuple[int, int, str]:
    """Train, and return the number of calls of `verify`, the number of steps, and the error message, if any."""
    steps, compared, message = Steps(), [], ""

    def counted(*args, original=mixin.verify):
        compared.append(original(*args))

    with made_wrong(how or "nothing") as model, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixin, "verify", counted)
        settings = {"verify": verified}
        run = make_trainer(2, folder, model=model, settings=settings, max_steps=2)
        run.add_callback(steps)
        try:
            run.evaluate(run.train_dataset) if evaluate else run.train()
        except ValueError as error:
            message = str(error)
    return len(compared), steps.begun, message


def test_a_trainer_verifies_once_before_its_first_step(on_ranks, tmp_path):
    assert on_ranks(2, steps_of_a_trainer, tmp_path, True, None) == [(1, 2, "")] * 2
    assert on_ranks(2, steps_of_a_trainer, tmp_path, False, None) == [(0, 2, "")] * 2
    assert on_ranks(2, steps_of_a_trainer, tmp_path, True, None, True) == [(0, 0, "")] * 2


def test_a_trainer_stops_before_its_first_step(on_ranks, tmp_path):
    [(_, steps, message), other] = on_ranks(2, steps_of_a_trainer, tmp_path, True, "scale")
    assert steps == 0 and WRONG["scale"] in message and other[1:] == (steps, message)
    assert on_ranks(2, steps_of_a_trainer, tmp_path, False, "scale") == [(0, 2, "")] * 2


def test_what_is_no_number_is_not_explained_by_rounding():
    nan = float("nan")
    found = verify._of_all_ranks([verify.Difference("layer", "output", "packed", nan, nan)], context())
    with pytest.raises(ValueError, match=r"its output differs from that on whole sequences by inf"):
        raise verify._first_error(found)
