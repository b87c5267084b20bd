"""Benchmark of one causal attention layer, forward and backward, on the ranks of a CP group.

    python -m benchmarks.attention --ranks 2,4 --tokens 4096,8192,16384 --dtypes float32,bfloat16

Batches are one document of each length, the longest in the first dtype alone. In that dtype they are also packed
documents and a window, of `PACKED` tokens. Ranks are processes with one torch thread each. Variants are timed in
turns, over the same CPU kernel:

    ideal         the kernel calls of an equal share of the arithmetic, 1/N of the heads of the whole batch, and
                  nothing else: no messages, no merging, no copies
    share         the kernel calls of a rank's own part in p2p, and nothing else
    p2p, all_gather, a2a, a2a+p2p (in pairs)
                  `attention` by each strategy in the layout `balanced`, as layers of a model call it. Layouts and
                  plans are made before. The strategy that `auto` chooses is marked.
    one process   the whole batch on one process that has as many threads as there are ranks
    ...           other packages, if they support the case: pip install --no-deps ring-flash-attn axolotl-ringmaster;
                  and the ring of torch

A run lasts from the start of the first rank to the end of the last rank. Efficiency is the time of ideal over the time
of a variant in the same round. Before a batch is timed, outputs and gradients are compared with those of one process.
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
from functools import cache
from itertools import product
from math import comb
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from hf_context_parallel.attention.auto_strategy import choose
from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import Shape, build_strategy
from hf_context_parallel.config import ContextParallelConfig
from hf_context_parallel.distributed.mesh import ranks_of
from hf_context_parallel.distributed.messages import Exchange
from hf_context_parallel.distributed.shared_memory import make_exchange
from hf_context_parallel.planning.balanced import balanced
from hf_context_parallel.planning.layout import Layout, zigzag
from hf_context_parallel.planning.machine import machine_of
from hf_context_parallel.planning.mask import Mask, Pattern, from_cu_seqlens
from hf_context_parallel.planning.plan import build_own_plan, build_plan
from hf_context_parallel.trainer.memory import PeakMemory

from . import peers, report
from .peers import Layer, MissingPeer, Run, UnsuitablePeer

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # relative to the largest entry of a tensor
ROUND_TOKENS = 4096  # tokens of the batches that are timed in the full number of rounds
PACKED_AIM = 0.9  # efficiency of the choice of auto, on packed batches
SHARE_AIMS = {(2, 4096): 0.98, (2, 16384): 0.98}  # time of share over that of auto, by ranks and tokens
CHOICE_AIM = 0.97  # time of the best of our strategies over that of the choice of auto
PACKED = 8192  # tokens of packed batches and windows, and of the longest document in further dtypes
WINDOW = 1024
OVERSUBSCRIBED_TOKENS = 8192  # the longest sequence timed by default with more ranks than cores


class Case(NamedTuple):
    """Case to be timed. `tokens` counts the whole batch, and `batch` is one of `BATCHES`."""

    ranks: int
    batch: str
    tokens: int
    dtype: str
    heads: int
    key_heads: int
    head_dim: int


def long_tail(tokens: int) -> list[int]:
    """Log-normal lengths (sigma 1) in random order. A few documents have most of the tokens."""
    shares = torch.randn(16, generator=torch.Generator().manual_seed(3)).exp()
    lengths = [int(tokens * share / shares.sum()) // 16 * 16 for share in shares[1:]]
    return [tokens - sum(lengths), *lengths]


# Lengths are multiples of 16, since other packages pad documents to multiples of twice the number of ranks.
BATCHES: dict[str, tuple[Callable[[int], list[int]], int | None]] = {
    "one document": (lambda tokens: [tokens], None),
    "four documents": (lambda tokens: [tokens * share // 16 for share in (3, 6, 2, 5)], None),
    "long tail": (long_tail, None),
    "tiny documents": (lambda tokens: [16, 32, 48] * (tokens // 96) + [tokens % 96] * (tokens % 96 > 0), None),
    "window": (lambda tokens: [tokens], WINDOW),
}
"""Lengths of the documents of each batch, and the window of the layer."""


def ideal(layer: Layer) -> Run:
    """Make a run of an equal share of the arithmetic: 1/N of the heads, without messages or copies."""
    size, rank = dist.get_world_size(layer.group), dist.get_rank(layer.group)
    query, key, value, grad_output = (tensor.chunk(size, dim=1)[rank].contiguous() for tensor in layer.whole)
    calls = _calls_of_one(layer)
    output, lse = torch.randn_like(grad_output), torch.full(grad_output.shape[:2], 10.0)

    def run():
        for call in calls:
            layer.kernel.forward(query, key, value, call, layer.scores)
        for call in calls:
            layer.kernel.backward(grad_output, query, key, value, output, lse, call, layer.scores)
        return ()

    return run


def share(layer: Layer) -> Run:
    """Make a run of this rank's tiles in p2p, with keys that are already there."""
    size, rank = dist.get_world_size(layer.group), dist.get_rank(layer.group)
    layout = dealt(layer.mask, size)
    query, key, _, grad_output = (tensor[layout.positions(rank)] for tensor in layer.whole)
    steps = build_plan(layout, layer.mask, rank).steps
    output, lse = torch.randn_like(grad_output), torch.full(grad_output.shape[:2], 10.0)
    keys = [torch.randn(2, step.tokens, *key.shape[1:]).to(key.dtype) for step in steps]

    def run():
        for step, (key, value) in zip(steps, keys):
            for call in step.calls:
                layer.kernel.forward(query, key, value, call, layer.scores)
        for step, (key, value) in zip(steps, keys):
            for call in step.calls:
                layer.kernel.backward(grad_output, query, key, value, output, lse, call, layer.scores)
        return ()

    return run


def _calls_of_one(layer: Layer):
    """Kernel calls of one process that has the whole batch."""
    return build_own_plan(zigzag(layer.mask.length, 1), layer.mask, 0).steps[0].calls


def ours(comm_type: str) -> Callable[[Layer], Run]:
    def build(layer: Layer) -> Run:
        size, rank = dist.get_world_size(layer.group), dist.get_rank(layer.group)
        if comm_type == "a2a+p2p" and size < 4:
            raise UnsuitablePeer("two ranks cannot be divided into subgroups of two")
        layout = dealt(layer.mask, size)
        query, key, value = (tensor.transpose(0, 1) for tensor in layer.whole[:3])
        machine = machine_of(torch.device("cpu"), size, os.cpu_count())
        choice = choose(settings(size, comm_type), comm_type, layout, layer.mask, Shape.of(query, key, value), machine)
        strategy = build_strategy(comm_type, choice.inner, layout, layer.mask, rank, choice.together, choice.groups)
        inputs = [tensor[layout.positions(rank)].requires_grad_() for tensor in layer.whole[:3]]
        grad_output = layer.whole[3][layout.positions(rank)]
        how = {"exchange": exchange_of(layer.group), "kernel": layer.kernel, "scores": layer.scores}

        def run():
            output = attention(*inputs, strategy=strategy, **how)
            return output.detach(), *torch.autograd.grad(output, inputs, grad_output)

        run.positions = layout.positions(rank)
        return run

    return build


@cache
def exchange_of(group: dist.ProcessGroup) -> Exchange:
    """Messages of our variants, as a `ContextParallel` makes them."""
    return make_exchange(ranks_of(group))


def one_process(layer: Layer) -> Run:
    """Make a run in which rank 0 computes, and the other ranks are idle."""
    if dist.get_rank(layer.group):
        return lambda: ()
    *inputs, grad_output = layer.whole
    calls = _calls_of_one(layer)
    rows = [torch.cat([torch.arange(*interval) for interval in call.queries]) for call in calls]

    def run():
        torch.set_num_threads(dist.get_world_size(layer.group))
        output, lse = torch.empty_like(grad_output), torch.empty(grad_output.shape[:2])
        for call, places in zip(calls, rows):
            part, part_lse = layer.kernel.forward(*inputs, call, layer.scores)
            output[places], lse[places] = part.to(output.dtype), part_lse
        grads = [torch.empty_like(tensor) for tensor in inputs]
        for call, places in zip(calls, rows):
            parts = layer.kernel.backward(grad_output, *inputs, output, lse, call, layer.scores)
            for grad, part in zip(grads, parts):
                grad[places] = part.to(grad.dtype)
        torch.set_num_threads(1)
        return output, *grads

    return run


OURS = {name: ours(name) for name in ("p2p", "all_gather", "a2a", "a2a+p2p")}
PEERS = {
    "ring-flash-attn zigzag": peers.ring_flash_attn_zigzag,
    "ring-flash-attn zigzag varlen": peers.ring_flash_attn_zigzag_varlen,
    "ring-flash-attn llama3": peers.ring_flash_attn_llama3,
    "ringmaster Ulysses": peers.ringmaster_ulysses,
    "torch's ring": peers.torch_ring,
}
VARIANTS = {"ideal": ideal, "share": share, **OURS, "one process": one_process, **PEERS}


def build_layer(case: Case) -> Layer:
    """Build the layer, with the same random numbers on every rank."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    dtype = getattr(torch, case.dtype)
    whole = [torch.randn(case.tokens, n, case.head_dim, generator=generator).to(dtype) for n in heads]
    return Layer(whole, build_mask(case), choose_kernel("cpu", "cpu"), Scores(case.head_dim**-0.5), dist.group.WORLD)


def build_mask(case: Case) -> Mask:
    lengths, window = BATCHES[case.batch][0](case.tokens), BATCHES[case.batch][1]
    edges = torch.tensor([0, *lengths]).cumsum(0)
    return Mask(case.tokens, (from_cu_seqlens(edges, case.tokens),), Pattern(sliding_window=window))


def chosen(case: Case, cores: int) -> str:
    """Strategy that `comm_type="auto"` chooses on a machine with `cores` cores."""
    shape = Shape(case.heads, case.key_heads, case.head_dim, case.head_dim, getattr(torch, case.dtype))
    machine, mask = machine_of(torch.device("cpu"), case.ranks, cores), build_mask(case)
    return choose(settings(case.ranks, "auto"), "auto", dealt(mask, case.ranks), mask, shape, machine).comm_type


def settings(size: int, comm_type: str) -> ContextParallelConfig:
    """Settings with a strategy, in which pairs of ranks exchange heads under a2a+p2p."""
    return ContextParallelConfig(size=size, comm_type=comm_type, a2a_size=2 if size == 4 else None)


def dealt(mask: Mask, size: int) -> Layout:
    """Layout of our variants: balanced, which is zigzag for one document."""
    return balanced(mask.length, size, mask.rows[0])


def build_runs(layer: Layer, variants: list[str]) -> tuple[dict[str, Run], list[str]]:
    """Build the variants by name, and list the reasons why others are absent."""
    runs, absent = {}, []
    for name in variants:
        try:
            runs[name] = VARIANTS[name](layer)
        except MissingPeer as error:
            absent.append(str(error))
        except UnsuitablePeer:
            pass
    return runs, absent


def verify(case: Case, layer: Layer, runs: dict[str, Run]) -> dict[str, float | None]:
    """Run every variant once, and compare its results with those of one process.

    Returns:
        The peak memory of each variant; see `measured_memory`.

    Raises:
        AssertionError: naming the variant and the tensor that differ.
    """
    expected = [torch.empty_like(tensor) for tensor in (layer.whole[3], *layer.whole[:3])]
    for tensor, result in zip(expected, runs["one process"]()):
        tensor.copy_(result)
    for tensor in expected:
        dist.broadcast(tensor, 0)
    peaks = {}
    for name, run in runs.items():
        results, peaks[name] = measured_memory(run)
        if name == "one process":  # it is the reference, and has no results on other ranks
            continue
        for what, result, whole in zip(("output", "dq", "dk", "dv"), results, expected):
            error = (result - whole[run.positions]).abs().max() / whole.abs().max()
            assert error <= TOLERANCE[case.dtype], f"{name}: {what} of {case} is off by {error:.1e}"
    return peaks


def measure(run: Run) -> float:
    """Measure the seconds from the start of the first rank to the end of the last rank."""
    dist.barrier()
    start = time.monotonic()  # it is one clock for all processes of a machine
    run()
    times = torch.tensor([-start, time.monotonic()], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.sum().item()


def measured_memory(run: Run) -> tuple[tuple[torch.Tensor, ...], float | None]:
    """Run a variant, and measure its peak memory in MiB above the start, on the rank that needs most.

    Returns:
        Its results, and the peak, which is None if it cannot be measured.
    """
    memory = PeakMemory(torch.device("cpu"))
    dist.barrier()
    memory.start()
    results = run()
    peak = torch.tensor(float("nan") if memory.peak() is None else memory.peak() * 1024)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return results, None if peak.isnan() else peak.item()


def rounds_of(case: Case, rounds: int) -> int:
    """Rounds of a case: those of `ROUND_TOKENS` tokens, and fewer of longer batches, whose runs vary less."""
    return max(min(3, rounds), round(rounds * min(1.0, ROUND_TOKENS / case.tokens) ** 0.5))


def run_case(case: Case, variants: list[str], rounds: int, progress: tqdm) -> dict[str, Any]:
    """Compare the variants with one process, and measure their peak memory and the seconds of each round."""
    progress.set_description(f"{described(case)}: verifying")
    layer = build_layer(case)
    runs, absent = build_runs(layer, variants)
    memory = verify(case, layer, runs)  # so the first round finds the same memory as the others
    progress.set_description(described(case))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds_of(case, rounds)):
        # The order differs by round and is the same on every rank, so that caches favour no variant.
        for name in random.Random(number).sample(list(runs), len(runs)):
            seconds[name].append(measure(runs[name]))
        progress.update()
    auto = chosen(case, os.cpu_count())
    return {"case": case._asdict(), "auto": auto, "absent": absent, "memory_mib": memory, "seconds": seconds}


def described(case: Case) -> str:
    return f"{case.ranks} ranks, {case.batch}, {case.tokens:,} tokens, {case.dtype}"


def work(rank: int, cases: list[Case], variants: list[str], rounds: int, folder: str) -> None:
    """Run all cases on one rank. Rank 0 writes the results."""
    torch.set_num_threads(1)
    size = cases[0].ranks
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    total = sum(rounds_of(case, rounds) for case in cases)
    with tqdm(total=total, unit="round", disable=rank > 0) as progress:
        results = [run_case(case, variants, rounds, progress) for case in cases]
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def run_ranks(cases: list[Case], variants: list[str], rounds: int) -> list[dict[str, Any]]:
    """Results of the cases with the same number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (cases, variants, rounds, folder), nprocs=cases[0].ranks)
        return json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))


def efficiency(result: dict[str, Any], variant: str) -> tuple[float, float, float]:
    """Quartiles over the rounds of the time of ideal over that of the variant."""
    return _quartiles(a / b for a, b in zip(result["seconds"]["ideal"], result["seconds"][variant]))


def rows(result: dict[str, Any]):
    """Table rows, one for each variant."""
    case = Case(**result["case"])
    for name, seconds in result["seconds"].items():
        low, middle, high = (1000 * value for value in _quartiles(seconds))
        ideal_low, ideal_middle, ideal_high = efficiency(result, name)
        memory = result["memory_mib"][name]
        yield (
            f"{case.ranks}",
            case.batch,
            f"{case.tokens:,}",
            case.dtype,
            f"**{name}** (auto)" if name == result["auto"] else name,
            f"{middle:,.0f} ({low:,.0f} to {high:,.0f})",
            f"{ideal_middle:.3f} ({ideal_low:.3f} to {ideal_high:.3f})",
            "-" if memory is None else f"{memory:,.0f}",
        )


def verdicts(result: dict[str, Any]):
    """Sentences that compare the choice of auto with our other strategies, the peers and the aims.

    Runs of one variant vary by some percent. So an aim within the interval of the median is neither met nor missed.
    """
    case, auto, seconds = Case(**result["case"]), result["auto"], result["seconds"]

    def against(other: str) -> tuple[float, float, float]:
        """Median and its interval, of the time of another variant over that of the choice of auto."""
        return _interval([a / b for a, b in zip(seconds[other], seconds[auto])])

    best = min((name for name in OURS if name in seconds), key=lambda name: against(name)[1])
    aims = [(f"time of {best}, our fastest, over that of auto ({auto})", against(best), CHOICE_AIM)]
    aims += [(f"time of {name} over auto's", against(name), 1.0) for name in PEERS if name in seconds]
    if case.batch not in ("one document", "window"):
        aims.append(("efficiency of auto", against("ideal"), PACKED_AIM))
    if (case.ranks, case.tokens) in SHARE_AIMS and "share" in seconds:
        aims.append(("time of share over auto's", against("share"), SHARE_AIMS[case.ranks, case.tokens]))
    for what, (low, middle, high), aim in aims:
        outcome = "met" if low >= aim else "MISSED" if high < aim else "within the noise"
        yield f"{described(case)}: {outcome}, {what} {middle:.3f} ({low:.3f} to {high:.3f}) with {aim:.3g} the aim"


def _quartiles(values) -> tuple[float, float, float]:
    values = list(values)
    return tuple(quantiles(values, n=4, method="inclusive")) if len(values) > 1 else tuple(values * 3)


def _interval(values: list[float]) -> tuple[float, float, float]:
    """Median of some values, and the ends of an interval that has the true median with a probability of 95%.

    The ends are two of the values, counted from below and from above. The true median lies outside if fewer than so
    many values lie on one side of it, each with a probability of one half. Few values have no such interval, and the
    ends are then the least and the largest.
    """
    ordered, count = sorted(values), len(values)
    beyond = 0
    while sum(comb(count, number) for number in range(beyond + 1)) <= 0.025 * 2**count:
        beyond += 1
    beyond = max(beyond - 1, 0)
    return ordered[beyond], median(ordered), ordered[-1 - beyond]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=report.comma_separated(int), default=[2, 4])
    parser.add_argument("--tokens", type=report.comma_separated(int), default=[4096, 8192, 16384])
    parser.add_argument("--dtypes", type=report.comma_separated(), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=11, help="longer batches have fewer")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--variants",
        type=report.comma_separated(),
        default=list(VARIANTS),
        help="variants to time beside ideal, one process and the choice of auto",
    )
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for the page and its numbers")
    parser.add_argument("--name", default="attention", help="name of the page")
    parser.add_argument("--all", action="store_true", help="also long sequences on more ranks than cores")
    parser.add_argument("--batches", type=report.comma_separated(), default=list(BATCHES))
    parser.add_argument("--packed", type=int, default=PACKED, help="tokens of packed batches and windows")
    parser.add_argument(
        "--judge",
        type=Path,
        help="attention.json of an earlier run: judge its times by what auto chooses now, time none",
    )
    options = parser.parse_args(arguments)
    if options.judge:
        earlier = json.loads(options.judge.read_text(encoding="utf-8"))
        for result in earlier["results"]:
            result["auto"] = chosen(Case(**result["case"]), earlier["machine"]["cores"])
        write(options, earlier["machine"], earlier["results"], [])
        return 0

    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants has {', '.join(unknown)}: it takes {', '.join(VARIANTS)}")
    shape = (options.heads, options.kv_heads, options.head_dim)
    results, left_out = [], []
    for ranks in options.ranks:
        alone = [
            ("one document", tokens, dtype)
            for tokens, dtype in product(options.tokens, options.dtypes)
            if tokens <= PACKED or dtype == options.dtypes[0]
        ]
        packed = [(batch, options.packed, options.dtypes[0]) for batch in BATCHES if batch != "one document"]
        cases = [Case(ranks, *case, *shape) for case in alone + packed if case[0] in options.batches]
        if ranks > os.cpu_count() and not options.all:
            left_out += [case for case in cases if case.tokens > OVERSUBSCRIBED_TOKENS]
            cases = [case for case in cases if case.tokens <= OVERSUBSCRIBED_TOKENS]
        # One process is the reference of all results, and the choice of auto is what is judged.
        needed = {"ideal", "one process", *options.variants, *(chosen(case, os.cpu_count()) for case in cases)}
        variants = [name for name in VARIANTS if name in needed]
        results += run_ranks(cases, variants, options.rounds) if cases else []

    write(options, report.machine(), results, left_out)
    return 0


def write(
    options: argparse.Namespace, machine: dict[str, Any], results: list[dict[str, Any]], left_out: list[Case]
) -> None:
    """Write the page and the numbers of a run."""
    headers = ["ranks", "batch", "tokens", "dtype", "variant", "ms", "efficiency", "peak MiB a rank"]
    table = report.table(headers, [row for result in results for row in rows(result)])
    notes = [sentence for result in results for sentence in verdicts(result)]
    notes += sorted({f"absent: {reason}" for result in results for reason in result["absent"]})
    if left_out:
        lengths = ", ".join(sorted({f"{case.tokens:,} tokens on {case.ranks} ranks" for case in left_out}))
        notes.append(f"left out, more ranks than cores (--all times it): {lengths}")
    case, rounds = Case(**results[0]["case"]), sorted({len(result["seconds"]["ideal"]) for result in results})
    counted = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    about = (
        f"One causal layer, {case.heads} query heads on {case.key_heads} key heads of {case.head_dim}, "
        f"forward and backward; {peers.versions()}. Medians and quartiles of {counted} interleaved rounds; verdicts "
        "have the median and the interval in which it lies with a probability of 95%. "
        "Efficiency is the time of an equal share of the kernel calls alone (ideal) over a variant's; share is a "
        "rank's own kernel calls in p2p. Peak memory is above the start of a run. "
        f"The window is of {WINDOW:,} tokens."
    )
    text = "\n\n".join([report.described(machine), about, table, "\n".join(f"- {note}" for note in notes)])
    data = {"machine": machine, "results": results}
    report.write(options.output, options.name, "Attention on the CPU", text, data)


if __name__ == "__main__":
    sys.exit(main())
