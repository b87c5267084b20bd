"""One causal attention layer, forward and backward, on the ranks of a CP group.

    python -m benchmarks.attention --ranks 2,4 --tokens 4096,8192,16384 --dtypes float32,bfloat16

Ranks are processes that talk over gloo and have one torch thread each. Timed, interleaved, over the same CPU kernel:

    share         the kernel calls of this rank's plan and nothing else: no messages, no merging, no sums of gradients
    ours          `planned_attention` with a plan built before, as a model's layers call it
    prepared      the same with messages that are already there (--prepared): what merging and summing cost
    one process   the whole sequence on one process that has as many threads as there are ranks
    ...           the rings of others: pip install ring-flash-attn --no-deps; torch has its own

A run lasts from the first rank's start to the last rank's end. Efficiency is share's time over a variant's, round by
round. Before anything is timed, outputs and gradients are compared with the one process's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from hf_context_parallel.attention.exchange import Exchange, GroupExchange
from hf_context_parallel.attention.p2p import planned_attention
from hf_context_parallel.kernels import choose_kernel
from hf_context_parallel.kernels.base import Kernel, Scores
from hf_context_parallel.layout import zigzag
from hf_context_parallel.mask import Mask, whole_rows
from hf_context_parallel.memory import PeakMemory
from hf_context_parallel.plan import CAUSAL, Plan, Segments, build_plan

from . import report
from .peers import MissingPeer, ring_flash_attn_zigzag, torch_ring, versions
from .simulation import PreparedExchange

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of a tensor's largest entry
AIMS = {(2, 4096): 0.96, (2, 16384): 0.98}  # efficiency, by ranks and tokens
MARGIN = 0.005  # by which efficiency may be below the better peer's
OVERSUBSCRIBED_TOKENS = 8192  # the longest sequence timed by default with more ranks than cores


class Case(NamedTuple):
    """What is timed. `tokens` is of the whole sequence."""

    ranks: int
    tokens: int
    dtype: str
    heads: int
    key_heads: int
    head_dim: int


class Layer(NamedTuple):
    """One rank's part of a case: queries, keys and values `[T, H, D]` and the gradient of the output, and the same of
    the whole sequence."""

    inputs: list[torch.Tensor]
    grad_output: torch.Tensor
    whole: list[torch.Tensor]
    plan: Plan
    kernel: Kernel
    scores: Scores
    group: dist.ProcessGroup


Run = Callable[[], tuple[torch.Tensor, ...]]
"""Forward and backward: output `[T, H, D]`, and the gradients of query, key and value."""


def share(layer: Layer) -> Run:
    buffer = [torch.randn_like(tensor) for tensor in layer.inputs[1:]]
    output, lse = torch.randn_like(layer.grad_output), torch.full(layer.grad_output.shape[:2], 10.0)
    calls = [
        (call, layer.inputs[1:] if n == 0 else buffer) for n, s in enumerate(layer.plan.steps) for call in s.calls
    ]
    query = layer.inputs[0].detach()

    def run():
        for call, (key, value) in calls:
            layer.kernel.forward(query, key, value, call, layer.scores)
        for call, (key, value) in calls:
            layer.kernel.backward(layer.grad_output, query, key, value, output, lse, call, layer.scores)
        return ()

    return run


def ours(layer: Layer) -> Run:
    return _ring(layer, GroupExchange(layer.group))


def prepared(layer: Layer) -> Run:
    run = _ring(layer, PreparedExchange(torch.cat([torch.randn_like(tensor) for tensor in layer.inputs[1:]], dim=-1)))
    return lambda: run()[:0]  # of wrong numbers


def one_process(layer: Layer) -> Run:
    """Rank 0 computes, and the others have nothing to do."""
    if layer.plan.rank:
        return lambda: ()
    *inputs, grad_output = layer.whole
    tile = ((0, len(grad_output)),)
    segments = Segments(tile, tile, CAUSAL)

    def run():
        torch.set_num_threads(layer.plan.size)
        output, lse = layer.kernel.forward(*inputs, segments, layer.scores)
        grads = layer.kernel.backward(grad_output, *inputs, output, lse, segments, layer.scores)
        torch.set_num_threads(1)
        return output, *grads

    return run


def _ring(layer: Layer, exchange: Exchange) -> Run:
    inputs = [tensor.detach().requires_grad_() for tensor in layer.inputs]

    def run():
        settings = {"plan": layer.plan, "exchange": exchange, "kernel": layer.kernel, "scores": layer.scores}
        output = planned_attention(*inputs, **settings)
        return output.detach(), *torch.autograd.grad(output, inputs, layer.grad_output)

    return run


PEERS = {"ring-flash-attn": ring_flash_attn_zigzag, "torch's ring": torch_ring}
VARIANTS = {"share": share, "ours": ours, "prepared": prepared, "one process": one_process, **PEERS}


def build_layer(case: Case, rank: int) -> Layer:
    """The layer of `rank`, with the same random numbers on every rank."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    dtype = getattr(torch, case.dtype)
    whole = [torch.randn(case.tokens, n, case.head_dim, generator=generator).to(dtype) for n in heads]
    layout = zigzag(case.tokens, case.ranks)
    *inputs, grad_output = (tensor[layout.positions(rank)] for tensor in whole)
    plan = build_plan(layout, Mask(case.tokens, whole_rows(1, case.tokens)), rank)
    kernel = choose_kernel("cpu", "cpu")
    return Layer(inputs, grad_output, whole, plan, kernel, Scores(case.head_dim**-0.5), dist.group.WORLD)


def build_runs(layer: Layer, variants: list[str]) -> tuple[dict[str, Run], list[str]]:
    """The variants by name, and why others are absent."""
    runs, absent = {}, []
    for name in variants:
        try:
            runs[name] = VARIANTS[name](layer)
        except MissingPeer as error:
            absent.append(str(error))
    return runs, absent


def verify(case: Case, layer: Layer, runs: dict[str, Run]) -> None:
    """Runs every variant once, and compares with what one process computes.

    Raises:
        AssertionError: naming the variant and the tensor that differ.
    """
    expected = [torch.empty_like(tensor) for tensor in (layer.whole[0], *layer.whole[:3])]
    for tensor, result in zip(expected, runs["one process"]()):
        tensor.copy_(result)
    positions = zigzag(case.tokens, case.ranks).positions(layer.plan.rank)
    for tensor in expected:
        dist.broadcast(tensor, 0)
    for name, run in runs.items():
        # One process has nothing to be compared with, and on other ranks nothing at all.
        results = () if name == "one process" else run()
        for what, result, whole in zip(("output", "dq", "dk", "dv"), results, expected):
            error = (result - whole[positions]).abs().max() / whole.abs().max()
            assert error <= TOLERANCE[case.dtype], f"{name}: {what} of {case} is off by {error:.1e}"


def measure(run: Run) -> float:
    """Seconds from the first rank's start to the last rank's end."""
    dist.barrier()
    start = time.monotonic()  # one clock for all processes of a machine
    run()
    times = torch.tensor([-start, time.monotonic()], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.sum().item()


def measure_memory(run: Run) -> float | None:
    """MiB above the start at most, of the rank that needs most; None where it cannot be measured."""
    memory = PeakMemory(torch.device("cpu"))
    dist.barrier()
    memory.start()
    run()
    peak = torch.tensor(float("nan") if memory.peak() is None else memory.peak() * 1024)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return None if peak.isnan() else peak.item()


def time_case(case: Case, rank: int, variants: list[str], rounds: int, progress: tqdm) -> dict[str, Any]:
    """Seconds of each round and peak memory, by variant."""
    layer = build_layer(case, rank)
    runs, absent = build_runs(layer, variants)
    progress.set_description(f"{case.ranks} ranks, {case.tokens} tokens, {case.dtype}: verifying")
    verify(case, layer, runs)
    memory = {name: measure_memory(run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    progress.set_description(f"{case.ranks} ranks, {case.tokens} tokens, {case.dtype}")
    for number in range(rounds):
        # In another order each round, the same on every rank: what a run leaves in caches hits no variant more often.
        for name in random.Random(number).sample(list(runs), len(runs)):
            seconds[name].append(measure(runs[name]))
        progress.update()
    return {"case": case._asdict(), "absent": absent, "seconds": seconds, "memory_mib": memory}


def work(rank: int, cases: list[Case], variants: list[str], rounds: int, folder: str) -> None:
    """One rank, which goes through the cases with the others. Rank 0 writes what comes out."""
    torch.set_num_threads(1)
    size = cases[0].ranks
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    with tqdm(total=len(cases) * rounds, unit="round", disable=rank > 0) as progress:
        results = [time_case(case, rank, variants, rounds, progress) for case in cases]
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def run_ranks(cases: list[Case], variants: list[str], rounds: int) -> list[dict[str, Any]]:
    """The results of cases that have the same number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (cases, variants, rounds, folder), nprocs=cases[0].ranks)
        return json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))


def efficiency(result: dict[str, Any], variant: str) -> tuple[float, float, float]:
    """Quartiles over rounds of share's time over the variant's."""
    return _quartiles(a / b for a, b in zip(result["seconds"]["share"], result["seconds"][variant]))


def rows(result: dict[str, Any]):
    """A table row a variant."""
    case = Case(**result["case"])
    for name, seconds in result["seconds"].items():
        low, middle, high = (1000 * value for value in _quartiles(seconds))
        share_low, share_middle, share_high = efficiency(result, name)
        memory = result["memory_mib"][name]
        yield (
            f"{case.ranks}",
            f"{case.tokens:,}",
            case.dtype,
            name,
            f"{middle:,.0f} ({low:,.0f} to {high:,.0f})",
            f"{share_middle:.3f} ({share_low:.3f} to {share_high:.3f})",
            "-" if memory is None else f"{memory:,.0f}",
        )


def verdicts(result: dict[str, Any]):
    """How ours did against the peers and the aims, a sentence each."""
    case, middle = Case(**result["case"]), efficiency(result, "ours")[1]
    where = f"{case.ranks} ranks, {case.tokens:,} tokens, {case.dtype}:"
    present = [name for name in PEERS if name in result["seconds"]]
    ties = set()
    for name in present:
        low, ratio, high = _quartiles(a / b for a, b in zip(result["seconds"][name], result["seconds"]["ours"]))
        if low <= 1 <= high:
            ties.add(name)
        outcome = "a tie" if name in ties else "ours is faster" if ratio > 1 else "ours is slower"
        yield f"{where} {outcome}, {name}'s time over ours {ratio:.3f} ({low:.3f} to {high:.3f})"
    if present:
        best = max(present, key=lambda name: efficiency(result, name)[1])
        margin = efficiency(result, best)[1] - MARGIN
        met = "met" if middle >= margin else "a tie" if best in ties else "MISSED"
        yield f"{where} {met}, efficiency {middle:.3f} with {margin:.3f} the aim, {MARGIN} below {best}"
    aim = AIMS.get((case.ranks, case.tokens))
    if aim:
        yield f"{where} {'met' if middle >= aim else 'MISSED'}, efficiency {middle:.3f} with {aim} the aim"


def _quartiles(values) -> tuple[float, float, float]:
    values = list(values)
    return tuple(quantiles(values, n=4, method="inclusive")) if len(values) > 1 else tuple(values * 3)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=report.comma_separated(int), default=[2, 4])
    parser.add_argument("--tokens", type=report.comma_separated(int), default=[4096, 8192, 16384])
    parser.add_argument("--dtypes", type=report.comma_separated(), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for attention.md and .json")
    parser.add_argument("--all", action="store_true", help="also long sequences on more ranks than cores")
    parser.add_argument("--prepared", action="store_true", help="also ours with messages that are already there")
    options = parser.parse_args(arguments)

    variants = [name for name in VARIANTS if name != "prepared" or options.prepared]
    shape = (options.heads, options.kv_heads, options.head_dim)
    results, left_out = [], []
    for ranks in options.ranks:
        cases = [Case(ranks, *pair, *shape) for pair in product(options.tokens, options.dtypes)]
        if ranks > os.cpu_count() and not options.all:
            left_out += [case for case in cases if case.tokens > OVERSUBSCRIBED_TOKENS]
            cases = [case for case in cases if case.tokens <= OVERSUBSCRIBED_TOKENS]
        results += run_ranks(cases, variants, options.rounds) if cases else []

    headers = ["ranks", "tokens", "dtype", "variant", "ms", "efficiency", "peak MiB a rank"]
    table = report.table(headers, [row for result in results for row in rows(result)])
    notes = [sentence for result in results for sentence in verdicts(result)]
    notes += sorted({f"absent: {reason}" for result in results for reason in result["absent"]})
    if left_out:
        lengths = ", ".join(sorted({f"{case.tokens:,} tokens on {case.ranks} ranks" for case in left_out}))
        notes.append(f"left out, more ranks than cores (--all times it): {lengths}")
    about = (
        f"One causal layer, {options.heads} query heads on {options.kv_heads} key heads of {options.head_dim}, "
        f"forward and backward; {versions()}. Medians and quartiles of {options.rounds} interleaved rounds. "
        "Efficiency is the time of the ranks' kernel calls alone (share) over a variant's. Peak memory is above "
        "the start of a run."
    )
    facts = report.machine()
    text = "\n\n".join([report.described(facts), about, table, "\n".join(f"- {note}" for note in notes)])
    data = {"machine": facts, "results": results}
    report.write(options.output, "attention", "Ring attention on the CPU", text, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
