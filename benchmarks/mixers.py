"""Benchmark of one mixer other than attention, forward and backward, on two ranks.

    python -m benchmarks.mixers --tokens 2048,4096

Ranks are processes with one torch thread each. Variants are timed in turns on one sequence:

    one process       the whole sequence on one rank, while the other is idle
    whole sequences   the mixer sees the whole sequence on one of the ranks, and its output returns to the shards
    native            each rank convolves its own tokens, with a halo, and scans its share of the heads
    halves            each rank has half of the tokens for a sequence of its own: the same work without messages

A run lasts from the first rank's start to the last rank's end. Before anything is timed, outputs and gradients are
compared with those of one process.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import hf_context_parallel as hcp
from hf_context_parallel.distributed.worker_pool import WorkerPool
from hf_context_parallel.integration.mixers.native import NativePatch
from hf_context_parallel.integration.mixers.whole_sequences import WholePatch

from . import report
from .turns import in_turns, timed

RANKS = 2
TOLERANCE = 1e-4  # relative to the largest entry of a tensor
TIMEOUT = 600
_COMMON = {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 512, "intermediate_size": 64}
MIXERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gated delta net": (
        "qwen3_5_text",
        "Qwen3_5GatedDeltaNet",
        {
            "layer_types": ["linear_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "Mamba2": (
        "nemotron_h",
        "NemotronHMamba2Mixer",
        {
            "layers_block_type": ["mamba"],
            "mamba_num_heads": 16,
            "mamba_head_dim": 64,
            "n_groups": 4,
            "ssm_state_size": 64,
            "chunk_size": 128,
        },
    ),
    "short convolution": ("lfm2", "Lfm2ShortConv", {"layer_types": ["conv"], "hidden_size": 1024}),
}
"""Model type, class and layer sizes of each mixer."""

VARIANTS = ("one process", "whole sequences", "native", "halves")
OTHERS = tuple(variant for variant in VARIANTS if variant != "native")

Run = Callable[[], list[torch.Tensor]]
"""Forward and backward: the output, and the gradients of the input and the parameters. An idle rank returns none."""


def build(name: str) -> tuple[torch.nn.Module, int]:
    """Build a mixer, the same on every rank, and return it with the width of its input."""
    model_type, kind, sizes = MIXERS[name]
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **{**_COMMON, **sizes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return next(part for part in model.modules() if type(part).__name__ == kind), config.hidden_size


def passes(mixer: torch.nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> Run:
    inputs = [x.requires_grad_(), *mixer.parameters()]

    def run():
        output = mixer(hidden_states=x)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad_output)]

    return run


def measure(name: str, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of each round for each variant. The results are the same on every rank.

    Raises:
        ValueError: if a variant's results are not those of one process.
    """
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=RANKS))
    whole, width = build(name)
    x, grad_output = torch.randn(2, 1, tokens, width, generator=torch.Generator().manual_seed(1))
    sharding = cp.shard({"input_ids": torch.zeros(1, tokens, dtype=torch.long)})
    with sharding:
        runs = {"one process": passes(whole, x, grad_output) if cp.rank == 0 else list}
        half = slice(cp.rank * tokens // RANKS, (cp.rank + 1) * tokens // RANKS)
        runs["halves"] = passes(whole, x[:, half].clone(), grad_output[:, half])
        replacements = {"whole sequences": WholePatch(), "native": NativePatch()}
        positions = sharding.shard.layout.positions(cp.rank)
        for variant, replacement in replacements.items():
            mixer, _ = build(name)
            replacement.replace(mixer)
            runs[variant] = passes(mixer, x[:, positions].detach(), grad_output[:, positions])
        expected = passes(whole, x, grad_output)()
        for variant in replacements:
            _check(variant, runs[variant](), expected, positions)
        together = {variant: timed(run, before=dist.barrier, after=dist.barrier) for variant, run in runs.items()}
        return in_turns(together, rounds)


def _check(variant: str, found: list[torch.Tensor], expected: list[torch.Tensor], positions: torch.Tensor) -> None:
    for index, (mine, truth) in enumerate(zip(found, expected)):
        if index < 2:  # these are by token; ranks have shares of parameter gradients
            truth = truth[:, positions]
        else:
            dist.all_reduce(mine)
        error = (mine - truth).abs().max() / truth.abs().max()
        if not error < TOLERANCE:
            raise ValueError(f"{variant}: result {index} is off by {error:.1e} of its largest entry.")


def page(results: list[tuple[str, int, dict[str, list[float]]]]) -> str:
    """Table of the milliseconds of each variant, and of its time over that of native by round."""
    rows = []
    for name, tokens, seconds in results:
        times = [f"{1000 * median(seconds[variant]):.0f}" for variant in VARIANTS]
        ratios = [median(a / b for a, b in zip(seconds[other], seconds["native"])) for other in OTHERS]
        rows.append([name, f"{tokens:,}", *times, *(f"{ratio:.2f}" for ratio in ratios)])
    headers = [*(f"{variant}, ms" for variant in VARIANTS), *(f"{other} / native" for other in OTHERS)]
    return report.table(["mixer", "tokens", *headers], rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", type=report.comma_separated(), default=list(MIXERS))
    parser.add_argument("--tokens", type=report.comma_separated(int), default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    here = importlib.import_module("benchmarks.mixers")  # under the name by which workers import it
    workers = WorkerPool(RANKS, TIMEOUT)
    results, data = [], []
    for name in options.mixers:
        for tokens in options.tokens:
            seconds = workers(RANKS, here.measure, name, tokens, options.rounds)[0]
            results.append((name, tokens, seconds))
            data.append({"mixer": name, "tokens": tokens, "seconds": seconds})
    workers.close()
    facts = report.machine()
    text = (
        f"{RANKS} ranks of one thread each, one sequence, forward and backward in float32, medians of "
        f"{options.rounds} interleaved rounds. {report.described(facts)}\n\n{page(results)}\n\n"
        "With one sequence, resharding whole sequences lets one rank do all of the work; natively each rank does half "
        "of it. Halves, two sequences of half the length side by side, are what the machine can do without messages. "
        "The scans are Transformers' own in PyTorch."
    )
    report.write(options.output, "mixers", "Mixers", text, {"machine": facts, "results": data})
    return 0


if __name__ == "__main__":
    sys.exit(main())
