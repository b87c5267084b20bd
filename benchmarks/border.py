"""Benchmark of what the border of a decoder costs, and of the memory that the loss of a language model takes.

    python -m benchmarks.border

**Time.** A step (forward, backward, optimizer) of a small Llama on one process: stock, and prepared by `parallelize`
for CP groups of one rank. Both take turns in each round.

**Memory.** The peak of a step of two tiny layers with a vocabulary of 128,256, in bfloat16, above the memory before
it: stock, and prepared. Each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_context_parallel as hcp
from hf_context_parallel.distributed.worker_pool import WorkerPool
from hf_context_parallel.trainer.memory import PeakMemory

from . import report
from .turns import in_turns, timed

TIMEOUT = 900
VOCABULARY = 128_256
MIB = 1024


def model_of(attention: str, **sizes: Any) -> LlamaForCausalLM:
    """Make a Llama with random weights, the same for every attention."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation=attention)
    return model.train()


def stepper(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a function that takes a step of plain SGD and returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def batch_of(rows: int, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def times(tokens: int, rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of steps, in turns.

    Raises:
        ValueError: if the losses differ.
    """
    torch.set_num_threads(1)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 1024}
    batch = batch_of(1, tokens, sizes["vocab_size"])
    cp = hcp.ContextParallel(hcp.ContextParallelConfig())
    models = {"stock": model_of("sdpa", **sizes), "prepared": model_of("context_parallel", **sizes)}
    hcp.parallelize(models["prepared"], cp)
    steps = {name: stepper(model, batch) for name, model in models.items()}
    losses = {name: step() for name, step in steps.items()}
    if not torch.allclose(losses["stock"], losses["prepared"], rtol=1e-5):
        raise ValueError(f"the losses differ: {losses}.")
    return in_turns({name: timed(step) for name, step in steps.items()}, rounds)


def peak(kind: str, tokens: int) -> float:
    """Measure the peak memory of a step in MiB."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY}
    model = model_of("sdpa" if kind == "stock" else "context_parallel", **sizes).to(torch.bfloat16)
    if kind == "prepared":
        hcp.parallelize(model, hcp.ContextParallel(hcp.ContextParallelConfig()))
    batch = batch_of(1, tokens, VOCABULARY)
    model(**batch_of(1, 16, VOCABULARY)).loss.backward()  # what is made once
    model.zero_grad()
    watch = PeakMemory(torch.device("cpu"))
    watch.start()
    model(**batch).loss.backward()
    return watch.peak() * MIB


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row whose steps are timed")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--memory-tokens", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    peaks = {}
    for kind in ("stock", "prepared"):
        pool = WorkerPool(1, TIMEOUT)
        [peaks[kind]] = pool(1, peak, kind, options.memory_tokens)
        pool.close()
    seconds = times(options.tokens, options.rounds)
    middle = {name: median(values) for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["stock"], seconds["prepared"])]
    rows = [[name, f"{1e3 * middle[name]:.1f}", f"{middle[name] / middle['stock']:.3f}"] for name in seconds]
    memory = [[name, f"{peaks[name]:,.0f}", f"{peaks[name] / peaks['stock']:.2f}"] for name in peaks]
    text = "\n\n".join(
        [
            f"A step of a Llama of 4 layers, width 256, {options.tokens} tokens, float32, one thread, CP groups of "
            f"one rank; the median of {options.rounds} rounds.",
            report.table(["model", "ms", "of stock"], rows),
            f"Peak memory of a step of 2 layers, width 64, {options.memory_tokens:,} tokens, a vocabulary of "
            f"{VOCABULARY:,}, bfloat16, above the memory before it.",
            report.table(["model", "MiB", "of stock"], memory),
            report.described(report.machine()),
        ]
    )
    data = {"machine": report.machine(), "seconds": seconds, "ratio": median(ratios), "peak_mib": peaks}
    report.write(options.output, "border", "The cost of the border, and the memory of the loss", text, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
