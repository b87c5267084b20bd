"""Whole models on one GPU with one rank of CP: results, time and memory, compared with stock attention."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_context_parallel as hcp
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
    for model_type in TYPES:
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
    """Relative error of all gradients together, or of the loss if that is larger."""
    pairs = [
        (mine.grad.double(), other.grad.double())
        for mine, other in zip(model.parameters(), truth.parameters())
        if other.grad is not None
    ]
    square = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    return max(square.sqrt().item(), abs(loss.item() / true_loss.item() - 1))


def tiny(model_type: str, device: torch.device) -> Iterator[dict[str, Any]]:
    config = tiny_config(model_type)
    input_ids = torch.randint(3, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": input_ids, "labels": input_ids}

    def taken(attention: str | None, dtype: torch.dtype, kernel: str | None = None):
        model = tiny_model(config, attention, torch.float32).to(device, dtype)  # it has the same weights, rounded
        if kernel is None:
            return model, whole_step(model, batch)
        return model, sharded_step(model, batch, hcp.ContextParallel(hcp.ContextParallelConfig(size=1, kernel=kernel)))

    truth = taken(None, torch.float32)
    error = difference(*taken("context_parallel", torch.float32, "reference"), *truth)
    yield {"what": f"{model_type}, float32", "right": error <= EXACT, "error": error}
    stock = difference(*taken(None, torch.bfloat16), *truth)
    try:
        error = difference(*taken("context_parallel", torch.bfloat16, "auto"), *truth)
    except ValueError as refusal:
        yield {"what": f"{model_type}, bfloat16, refused", "message": str(refusal)[:200]}
        return
    yield {"what": f"{model_type}, bfloat16", "right": error <= OF_STOCK * stock, "error": error, "stock": stock}


def large(device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure four layers of the shape of Llama-3-8B, with its vocabulary and 16,384 tokens."""
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
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=1))
    found: dict[str, dict[str, float]] = {}
    gradients: dict[str, torch.Tensor] = {}
    for attention in ("sdpa", "context_parallel"):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **sizes)
        with device:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
        model.train()
        for checkpointing in (None, False, True):
            if checkpointing is not None:
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
                model.enable_input_require_grads()
            name = {None: "kept", False: "checkpointed", True: "checkpointed, reentrant"}[checkpointing]

            def step(model=model, attention=attention):
                model.zero_grad()
                return whole_step(model, batch) if attention == "sdpa" else sharded_step(model, batch, cp)

            times = measure(step, device, repeats=3 if checkpointing is None else 1)
            loss = step().item()
            middle = model.model.layers[2].self_attn.k_proj.weight.grad.float().clone()
            if attention == "sdpa":
                gradients[name], found[name] = middle, {"loss": loss, **times}
                continue
            stock = found[name]
            error = ((middle - gradients[name]).norm() / gradients[name].norm()).item()
            ratio = times["ms"] / stock["ms"]
            yield {
                "what": f"{tokens} tokens of a llama of 4 layers, {name}",
                "right": error < 0.05 and abs(loss / stock["loss"] - 1) < 1e-3 and (small or ratio <= OVERHEAD),
                "ms": times["ms"],
                "of stock's": ratio,
                "host ms": times["host ms"],
                "stock's host ms": stock["host ms"],
                "peak MiB": times.get("peak MiB"),
                "stock's peak MiB": stock.get("peak MiB"),
                "loss": loss,
                "stock's loss": stock["loss"],
                "gradient's error": error,
            }
        del model
