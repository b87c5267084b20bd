"""Memory of training Llama-3-8B with LoRA at up to 128K tokens a rank: weights, layers and loss, each by itself.

It is measured with 2 and with 4 of the 32 layers, in bfloat16 with gradient checkpointing and kept attention, in a
group of one rank that shards its batch. A rank of a CP group of N has 1/N of the tokens. It holds buffers of other
ranks' keys in addition, which the item `memory` measures.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import hf_context_parallel as hcp
from hf_context_parallel.integration.border.chunked_loss import LOGITS
from hf_context_parallel.integration.switches import sharded_on_one_rank
from hf_context_parallel.memory.facts import facts_of
from hf_context_parallel.memory.job import Job
from hf_context_parallel.memory.parts import parts_of

from .measure import DTYPES

RANK = 16
LAYERS, MEASURED = 32, (4, 2)
SIZES = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32}
SIZES |= {"num_key_value_heads": 8, "max_position_embeddings": 131_072}
SMALL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
TOKENS = {"cuda": (32_768, 65_536, 131_072), "cpu": (64, 128)}
BYTES, STATES = 20, 4
"""Most memory of the loss: bytes for each logit of a chunk, and hidden states for each token. There are the logits, in
float32 too, and their gradients; the hidden states of the targets, and their gradients in chunks and joined."""
KEPT = {"attention_checkpoints": "device"}
APART = 0.1
"""Largest difference of a peak from its count, as a fraction of the count."""
TWICE = 2.1
"""Largest peak without weights, as a multiple of that for half of the tokens."""


class Adapted(torch.nn.Module):
    """Linear layer whose weight is frozen, with the two small trained ones of LoRA."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        like = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.down = torch.nn.Linear(base.in_features, RANK, **like)
        self.up = torch.nn.Linear(RANK, base.out_features, **like)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Border(torch.nn.Module):
    """Last norm of a decoder, which notes the memory between the layers and the loss."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.norm, self.before, self.peak = norm, 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.norm(x)
        if x.is_cuda:
            self.before, self.peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return output


class Peaks(NamedTuple):
    """Bytes of a step: weights, and the largest sum in addition to them; the loss, in addition to what was there.

    The allocator of a CPU counts none, so all are 0 there.
    """

    weights: int
    step: int
    loss: int


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    model = adapted_model(device)
    layers, found = model.model.layers, {}
    with sharded_on_one_rank():
        for tokens in TOKENS[device.type]:
            by_layers = {}
            for number in MEASURED:
                model.model.layers, model.config.num_hidden_layers = layers[:number], number
                by_layers[number], trained = peaks_of(model, tokens, device)
                yield {"what": f"step of {tokens} tokens, {number} layers, all adapters are trained", "right": trained}
            found[tokens] = by_layers
            yield from parts(tokens, by_layers)
    for half, whole in zip(found, list(found)[1:]):
        ratio = found[whole][MEASURED[0]].step / max(1, found[half][MEASURED[0]].step)
        yield {
            "what": f"peak of {whole} tokens against {half}, without weights",
            "right": ratio <= TWICE,
            "ratio": ratio,
        }
    yield full_depth(found, weights_of(layers[0]))


def adapted_model(device: torch.device) -> torch.nn.Module:
    """Make the model, whose linear layers all have adapters, and prepare it."""
    torch.manual_seed(0)
    sizes = SIZES | (SMALL if device.type == "cpu" else {})
    config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=max(MEASURED))
    with device:
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="context_parallel", dtype=DTYPES[device.type]
        )
    model.requires_grad_(False).train()
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(block, name, Adapted(child))
    model.model.norm = Border(model.model.norm)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return hcp.parallelize(model, hcp.ContextParallel(hcp.ContextParallelConfig(size=1, **KEPT)))


def peaks_of(model: torch.nn.Module, tokens: int, device: torch.device) -> tuple[Peaks, bool]:
    """Measure a step, and return whether all adapters of its layers got finite gradients."""
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (1, tokens), generator=draw).to(device)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in adapters:
        parameter.grad = torch.zeros_like(parameter)  # which are counted as weights
    cuda = device.type == "cuda"
    weights = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    loss = model(input_ids=input_ids, labels=input_ids).loss
    norm = model.model.norm
    of_loss = torch.cuda.max_memory_allocated() if cuda else 0
    loss.backward()
    whole = max(norm.peak, torch.cuda.max_memory_allocated()) if cuda else 0
    trained = all(bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any()) for parameter in adapters)
    return Peaks(weights, whole - weights, of_loss - norm.before), trained


def parts(tokens: int, by_layers: dict[int, Peaks]) -> Iterator[dict[str, Any]]:
    """Split the peak of a step."""
    most, least = (by_layers[number] for number in MEASURED)
    hidden = tokens * SIZES["hidden_size"] * torch.bfloat16.itemsize
    limit = BYTES * LOGITS + STATES * hidden
    layer = (most.step - least.step) / (MEASURED[0] - MEASURED[1])
    peak, count = most.weights + most.step, counted(tokens)
    yield {
        "what": f"{tokens} tokens, {MEASURED[0]} layers",
        "right": not most.step or abs(peak / count - 1) <= APART,
        "peak GiB": peak / 2**30,
        "of what memory/ counts": peak / count,
        "weights GiB": most.weights / 2**30,
        "kept by a layer GiB": layer / 2**30,
        "of it hidden states": layer / hidden,
        "the rest GiB": (most.step - MEASURED[0] * layer) / 2**30,
    }
    yield {
        "what": f"loss of {tokens} tokens",
        "right": most.loss <= limit,
        "GiB": most.loss / 2**30,
        "at most GiB": limit / 2**30,
        "all logits GiB": tokens * SIZES["vocab_size"] * torch.bfloat16.itemsize / 2**30,
    }


def counted(tokens: int) -> float:
    """Count the bytes of the peak of a step of the deeper model, as `hf_context_parallel/memory/` does."""
    facts = facts_of(LlamaConfig(**SIZES, num_hidden_layers=MEASURED[0]), RANK)
    how = {"dtype": torch.bfloat16, "kernel": "torch", "checkpointing": True, "sharded": True, **KEPT}
    return parts_of(Job(facts, tokens, **how)).total


def weights_of(layer: torch.nn.Module) -> int:
    """Bytes of the parameters of a layer and of the gradients of the trained ones."""
    return sum(x.numel() * x.itemsize * (1 + x.requires_grad) for x in layer.parameters())


def full_depth(found: dict[int, dict[int, Peaks]], of_layer: int) -> dict[str, Any]:
    """Estimate the peak of a step of all layers, without the optimizer, by the ranks that share the most tokens.

    Args:
        found: peaks by tokens, and by the number of layers.
        of_layer: bytes of the weights of a layer.
    """
    gib = {}
    for tokens, by_layers in found.items():
        most, least = (by_layers[number] for number in MEASURED)
        layer = of_layer + (most.step - least.step) / (MEASURED[0] - MEASURED[1])
        gib[tokens] = (most.weights + most.step + (LAYERS - MEASURED[0]) * layer) / 2**30
    least, next_least = sorted(gib)[:2]
    gib[least // 2] = gib[least] - (gib[next_least] - gib[least]) / 2  # on the line through both
    estimates = {f"CP of {max(gib) // tokens}, GiB a rank": gib[tokens] for tokens in sorted(gib, reverse=True)}
    return {"what": f"estimate for {LAYERS} layers and {max(gib)} tokens", **estimates}
