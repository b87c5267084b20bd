"""Whole models on one GPU with one rank of CP: results, time and memory, compared with stock attention."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_context_parallel as hcp
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.verification.types.tiny import VOCABULARY, tiny_config, tiny_model

from .measure import measure

TYPES = ("llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "qwen3_moe", "qwen3_next", "deepseek_v3", "phi3")
EXACT = 1e-4
"""Largest relative error of loss or gradients in float32."""
OF_STOCK = 3.0
"""Largest error in bfloat16 as a multiple of the error of stock attention, both against float32. In either, rounding
may send tokens to other experts."""
OVERHEAD = 1.02
"""Largest time of a step with one rank of CP, as a multiple of the time with stock attention."""


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    for model_type in TYPES[:1] if device.type == "cpu" else TYPES:
        yield from tiny(model_type, device)
    yield from large(device)


def whole_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach()


def sharded_step(model: torch.nn.Module, batch: dict[str, torch.Tensor], cp: hcp.ContextParallel) -> torch.Tensor:
    with cp.shard(batch, model) as local:
        loss = model(**local).loss
        loss.backward()
    return loss.detach()


def difference(model: torch.nn.Module, loss: torch.Tensor, truth: torch.nn.Module, true_loss: torch.Tensor) -> float:
    """Relative error of all gradients of a model together, or of the loss if that is larger."""
    pairs = [
        (mine.grad.double(), other.grad.double())
        for mine, other in zip(model.parameters(), truth.parameters())
        if other.grad is not None
    ]
    return of_all(pairs, loss, true_loss)


def of_all(pairs: list[tuple[torch.Tensor, torch.Tensor]], loss: torch.Tensor, true_loss: torch.Tensor) -> float:
    """Relative error of the first tensors of all pairs against the second, or of the loss if that is larger."""
    square = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    return max(square.sqrt().item(), abs(loss.item() / true_loss.item() - 1))


def tiny(model_type: str, device: torch.device) -> Iterator[dict[str, Any]]:
    config = tiny_config(model_type)
    input_ids = torch.randint(3, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": input_ids, "labels": input_ids}

    def taken(attention: str | None, dtype: torch.dtype, kernel: str | None = None, autocast: bool = False):
        model = tiny_model(config, attention, torch.float32).to(device, dtype)  # it has the same weights, rounded
        if autocast:
            model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        if kernel is None:
            return model, whole_step(model, batch)
        return model, sharded_step(model, batch, hcp.ContextParallel(hcp.ContextParallelConfig(size=1, kernel=kernel)))

    truth = taken(None, torch.float32)
    error = difference(*taken("context_parallel", torch.float32, "reference"), *truth)
    yield {"what": f"{model_type}, float32", "right": error <= EXACT, "error": error}
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        what = f"{model_type}, {'autocast to ' * autocast}bfloat16"
        stock = difference(*taken(None, dtype, autocast=autocast), *truth)
        try:
            error = difference(*taken("context_parallel", dtype, "auto", autocast), *truth)
        except ValueError as refusal:
            yield {"what": f"{what}, refused", "message": str(refusal)[:200]}
            return
        yield {"what": what, "right": error <= OF_STOCK * stock, "error": error, "stock": stock}


def large(device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure four layers of the shape of Llama-3-8B, with its vocabulary and 16,384 tokens.

    Stock attention is cuDNN's on Hopper (`check_prefer_cudnn_attention` of PyTorch), so the same kernel is judged.
    `auto` compiles it when it has paid (`auto_kernel.py`). In these few steps it has not, so its time is only shown.
    """
    small = device.type == "cpu"
    sizes = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_key_value_heads": 8}
    sizes |= {"num_attention_heads": 32, "num_hidden_layers": 4, "max_position_embeddings": 131_072}
    if small:
        sizes |= {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
        sizes |= {"num_attention_heads": 8}
    tokens = 128 if small else 16_384
    input_ids = torch.randint(0, sizes["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": input_ids.to(device)}
    batch["labels"] = batch["input_ids"]
    models = {}
    for attention in ("sdpa", "context_parallel"):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **sizes)
        with device:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
        models[attention] = model.train()
    judged = choose_kernel("auto", device.type).name
    ways = {name: hcp.ContextParallel(hcp.ContextParallelConfig(size=1, kernel=name)) for name in (judged, "auto")}
    if small:
        del ways[judged]  # auto takes it too
    for checkpointing in (None, False, True):
        if checkpointing is not None:
            for model in models.values():
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
                model.enable_input_require_grads()
        how = {None: "kept", False: "checkpointed", True: "checkpointed, reentrant"}[checkpointing]

        def step(way: str | None) -> torch.Tensor:
            model = models["sdpa" if way is None else "context_parallel"]
            model.zero_grad()
            return whole_step(model, batch) if way is None else sharded_step(model, batch, ways[way])

        # In turns, since the clock of a device depends on its temperature.
        timed = range(1 if small else 2)
        turns = [{way: measure(partial(step, way), device, repeats=1) for way in (None, *ways)} for _ in timed]
        stock = min((turn[None] for turn in turns), key=lambda times: times["ms"])
        loss = step(None).item()
        expected = middle_gradient(models["sdpa"])
        for way in ways:
            times = min((turn[way] for turn in turns), key=lambda times: times["ms"])
            mine = step(way).item()
            error = ((middle_gradient(models["context_parallel"]) - expected).norm() / expected.norm()).item()
            ratio = times["ms"] / stock["ms"]
            fast = small or way == "auto" or ratio <= OVERHEAD
            yield {
                "what": f"{tokens} tokens of a llama of 4 layers, {how}, kernel={way!r}",
                "right": error < 0.05 and abs(mine / loss - 1) < 1e-3 and fast,
                "ms": times["ms"],
                "of stock's": ratio,
                "host ms": times["host ms"],
                "stock's host ms": stock["host ms"],
                "peak MiB": times.get("peak MiB"),
                "stock's peak MiB": stock.get("peak MiB"),
                "loss": mine,
                "stock's loss": loss,
                "gradient's error": error,
            }
        for model in models.values():
            model.zero_grad()


def middle_gradient(model: torch.nn.Module) -> torch.Tensor:
    return model.model.layers[2].self_attn.k_proj.weight.grad.float().clone()
