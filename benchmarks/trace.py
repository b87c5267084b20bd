"""Profile and picture of one layer: the times of its kernels and messages on every rank.

    python -m benchmarks.trace --ranks 4 --tokens 8192 --comm-types p2p,all_gather,a2a,a2a+p2p
    python -m benchmarks.trace --device cuda --dtype bfloat16 --tokens 131072 --heads 32 --kv-heads 8 --head-dim 128

On CPU, ranks are processes. The arrival of a message cannot be observed there. So a message is drawn
from the time it was posted to the end of waiting for it. On one GPU, ranks run one after another. Their messages are
copied on a stream of their own, as with NCCL. Kernels and copies are drawn at their times on the device.

The picture shows the shortest of several rounds. `--traces` keeps the profiles, for Perfetto or chrome://tracing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.profiling import span
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import Strategy, build_strategy
from hf_context_parallel.distributed.mesh import world
from hf_context_parallel.distributed.messages import Exchange
from hf_context_parallel.distributed.shared_memory import make_exchange
from hf_context_parallel.planning.intervals import total, union
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, whole_rows
from hf_context_parallel.planning.plan import Plan

from . import report
from .simulation import PreparedExchange

WARM_UP = 2  # rounds before the profiled ones
INNER = {"p2p": lambda size: 1, "all_gather": lambda size: 1, "a2a": lambda size: size, "a2a+p2p": lambda size: 2}
"""Number of ranks that exchange heads, for each strategy and group size."""
HEADS = ("to heads", "to tokens")

COLORS = {
    "kernels": "#3b76af",
    "merging": "#e8963c",
    "adding gradients": "#8a6bb1",
    "ordering": "#5f9e8f",
    "posting": "#707070",
    "waiting": "#d94d4d",
    "keys": "#9cc3e6",
    "gradients": "#c9b8e0",
    "heads": "#a8d5a2",
}
KINDS = {
    "compute": "kernels",
    "merge": "merging",
    "add sums": "adding gradients",
    "send": "posting",
    "send sums": "posting",
    "wait": "waiting",
    "wait sums": "waiting",
    "order": "ordering",
}
SENDS = {"send": ("wait", "keys"), "send sums": ("wait sums", "gradients")}
"""Range of the wait, and name of the message, for each range in which a message is posted."""


class Range(NamedTuple):
    """Range of a profile, in microseconds. `what` is of a `step` of a `direction`. Exchanges of heads have no step."""

    direction: str
    step: int | None
    what: str
    start: float
    end: float


class Bar(NamedTuple):
    """Bar of the picture, in milliseconds. `row` is "compute", or the name of the messages."""

    direction: str
    row: str
    kind: str
    label: str
    start: float
    end: float


def strategy_of(options: argparse.Namespace, comm_type: str, rank: int) -> Strategy:
    layout, mask = zigzag(options.tokens, options.ranks), Mask(options.tokens, whole_rows(1, options.tokens))
    return build_strategy(comm_type, INNER[comm_type](options.ranks), layout, mask, rank)


def posted(plan: Plan) -> set[tuple[str, int]]:
    """Ranges, by name and step, in which a rank posts messages."""
    posts = set()
    for number, (before, step) in enumerate(zip((None, *plan.steps), (*plan.steps, None))):
        after = plan.steps[number + 1] if number + 1 < len(plan.steps) else None
        keys = (*after.receives, *after.forwards, *after.direct_sends) if after else ()
        sums = (*before.grad_sends, *before.grad_returns, *(step.grad_receives if step else ())) if before else ()
        for what, transfers in (("send", keys), ("send sums", sums)):
            if any(transfer.peer != plan.rank for transfer in transfers):
                posts.add((what, number))
    return posts


def layer(options: argparse.Namespace, comm_type: str, rank: int, exchange: Exchange | None) -> Callable[[], None]:
    """Forward and backward of the layer on one rank. Without an exchange, messages are prepared before."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    strategy = strategy_of(options, comm_type, rank)
    heads = (options.heads, options.kv_heads, options.kv_heads)
    torch.manual_seed(rank)
    shapes = [(strategy.tokens, n, options.head_dim) for n in heads]
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    grad_output = torch.randn_like(inputs[0])
    settings = {
        "strategy": strategy,
        "exchange": exchange or PreparedExchange(torch.cat(inputs[1:], dim=-1).detach()),
        "kernel": choose_kernel("auto", device.type),
        "scores": Scores(options.head_dim**-0.5),
    }

    def run():
        # Backward runs in this thread, so that the range of the round contains it.
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(attention(*inputs, **settings), inputs, grad_output)

    return run


def profiled(run: Callable[[], None], rounds: int, device: str, path: Path) -> None:
    """Write the profile of some rounds to `path`."""
    for _ in range(WARM_UP):
        run()
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for number in range(rounds):
            if dist.is_initialized():
                dist.barrier()
            with span("round", str(number)):
                run()
            if cuda:
                torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


def work(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Run one rank, as a process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    exchange = make_exchange(world())
    for comm_type in options.comm_types:
        run = layer(options, comm_type, rank, exchange)
        profiled(run, options.rounds, options.device, _path(folder, comm_type, rank))
    dist.destroy_process_group()


def profile_all(options: argparse.Namespace, folder: str) -> None:
    """Write the profile of every rank and strategy into `folder`."""
    if options.device == "cpu":
        torch.multiprocessing.spawn(work, (options, folder), nprocs=options.ranks)
        return
    for comm_type in tqdm(options.comm_types):
        for rank in range(options.ranks):
            run = layer(options, comm_type, rank, exchange=None)
            profiled(run, options.rounds, options.device, _path(folder, comm_type, rank))


def _path(folder: str | Path, comm_type: str, rank: int) -> Path:
    return Path(folder, f"{comm_type}_rank{rank}.json.gz")


def read_rounds(path: Path, device: str) -> dict[int, list[Range]]:
    """Read the ranges of each round. On CUDA their times are those of the device.

    A round begins when the host begins it. It ends when the next round begins, and before that the host waits for the
    device. On CUDA, the time of a range is that of the work queued in it, without the work queued in ranges within it.
    """
    with gzip.open(path) as file:
        trace = json.load(file)
    category = "gpu_user_annotation" if device == "cuda" else "user_annotation"
    origin = trace.get("baseTimeNanoseconds", 0) / 1000
    spans = [
        (event["cat"], event["name"].split("/")[1:], origin + event["ts"], origin + event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") in (category, "user_annotation") and event["name"].startswith("cp/")
    ]
    begins = [
        (start, int(rest[0]))
        for kind, (what, *rest), start, _ in spans
        if (kind, what) == ("user_annotation", "round")
    ]
    rounds: dict[int, list[Range]] = {number: [] for _, number in begins}
    for kind, (direction, *rest), start, end in spans:
        if kind == category and direction != "round":
            step = int(rest[0].removeprefix("step")) if len(rest) == 2 else None
            number = max(begin for begin in begins if begin[0] <= start)[1]
            rounds[number].append(Range(direction, step, rest[-1], start, end))
    return rounds


def shortest(by_rank: list[dict[int, list[Range]]], together: bool) -> list[list[Range]]:
    """Ranges of the shortest round of each rank, from its start: one round for all ranks, or one for each rank."""

    def length(rank_rounds: list[list[Range]]) -> float:
        ranges = [r for rank in rank_rounds for r in rank]
        return max(r.end for r in ranges) - min(r.start for r in ranges)

    if together:
        best = min(by_rank[0], key=lambda number: length([rank[number] for rank in by_rank]))
        chosen = [rank[best] for rank in by_rank]
        origins = [min(r.start for rank in chosen for r in rank)] * len(chosen)
    else:
        chosen = [min(rank.values(), key=lambda ranges: length([ranges])) for rank in by_rank]
        origins = [min(r.start for r in rank) for rank in chosen]
    return [
        [r._replace(start=r.start - origin, end=r.end - origin) for r in rank] for rank, origin in zip(chosen, origins)
    ]


def bars(ranges: list[Range], posts: set[tuple[str, int]], device: str) -> list[Bar]:
    """Bars of one rank, which posts messages in the ranges `posts`."""
    drawn = []
    waits = {(r.direction, r.step, r.what): r.end for r in ranges}

    def draw(r: Range, row: str, kind: str, label: str, end: float | None = None) -> None:
        drawn.append(Bar(r.direction, row, kind, label, r.start / 1000, (r.end if end is None else end) / 1000))

    for r in ranges:
        if r.what in HEADS:
            draw(r, "keys", "heads", r.what)
            draw(r, "compute", "waiting", "")
        elif device == "cpu" or r.what not in SENDS:
            draw(r, "compute", KINDS[r.what], str(r.step) if r.what == "compute" else "")
        if (r.what, r.step) in posts:
            wait, kind = SENDS[r.what]
            of = r.step + 1 if kind == "keys" else r.step - 1
            draw(r, kind, kind, str(of), None if device == "cuda" else waits[r.direction, r.step, wait])
    return drawn


def plot(results: dict[str, list[list[Bar]]], title: str) -> Figure:
    """Draw a panel for each strategy, with two rows for each rank: its kernels, and its messages."""
    ranks = len(next(iter(results.values())))
    figure = Figure(figsize=(15, 1.2 + len(results) * (0.7 + 0.62 * ranks)), layout="constrained")
    panels = figure.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
    last = max(bar.end for by_rank in results.values() for drawn in by_rank for bar in drawn)
    for axis, (comm_type, by_rank) in zip(panels, results.items()):
        for rank, drawn in enumerate(by_rank):
            rows = {"compute": (rank - 0.42, 0.42), "keys": (rank + 0.02, 0.19), "gradients": (rank + 0.22, 0.19)}
            for direction, color in (("forward", "#f4f4f0"), ("backward", "#e9edf3")):
                start = min(bar.start for bar in drawn if bar.direction == direction)
                end = max(bar.end for bar in drawn if bar.direction == direction)
                axis.broken_barh([(start, end - start)], (rank - 0.46, 0.92), facecolor=color, lw=0)
                if rank == 0:
                    axis.annotate(direction, (start, -0.5), va="bottom", fontsize=8, color="#555555")
            for bar in drawn:
                low, height = rows[bar.row]
                axis.broken_barh(
                    [(bar.start, bar.end - bar.start)], (low, height), fc=COLORS[bar.kind], ec="white", lw=0.4
                )
                if bar.label and bar.end - bar.start > last * (0.006 + 0.005 * len(bar.label)):
                    color, size = ("white", 9) if bar.row == "compute" else ("black", 7)
                    middle = (bar.start + bar.end) / 2, low + height / 2
                    axis.annotate(bar.label, middle, ha="center", va="center_baseline", fontsize=size, color=color)
        axis.set_title(comm_type, loc="center", fontweight="bold")
        axis.set_ylim(ranks - 0.5, -0.55)
        axis.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        axis.set_xlim(0, last * 1.01)
        axis.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("ms")
    handles = [Patch(color=color, label=kind) for kind, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    return figure


def table(results: dict[str, list[list[Bar]]], device: str) -> str:
    """Table of the milliseconds of each kind on the ranks' kernel streams, and of the hidden part of messages."""
    rows = []
    for comm_type, by_rank in results.items():
        for rank, drawn in enumerate(by_rank):
            spent: dict[str, float] = defaultdict(float)
            for bar in drawn:
                spent[bar.row == "compute", bar.kind] += bar.end - bar.start
            whole = max(bar.end for bar in drawn) - min(bar.start for bar in drawn)
            kinds = ("kernels", "merging", "adding gradients", "posting", "waiting")
            shown = [f"{spent[True, kind]:.1f}" for kind in kinds]
            if device == "cuda":  # waiting is no work of the device there, so it is the time without kernels
                computing = [bar for bar in drawn if bar.row == "compute" and bar.kind != "waiting"]
                spent[True, "waiting"] = whole - total(union((bar.start, bar.end) for bar in computing))
            waiting = spent[True, "waiting"] / whole
            rows.append((comm_type, str(rank), f"{whole:.1f}", *shown, f"{waiting:.1%}"))
    headers = ["comm_type", "rank", "ms", "kernels", "merging", "adding gradients", "posting", "waiting", "of all"]
    return report.table(headers, rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--comm-types", type=report.comma_separated(), default=list(INNER))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the whole sequence")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--traces", type=Path, help="folder to keep the profiles in")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for trace.md, .png and .json")
    options = parser.parse_args(arguments)
    unknown = [comm_type for comm_type in options.comm_types if comm_type not in INNER]
    if unknown:
        parser.error(f"--comm-types has {', '.join(unknown)}: it takes {', '.join(INNER)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device. --device cpu traces processes on the CPU.", file=sys.stderr)
        return 2

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.traces or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        profile_all(options, str(folder))
        results: dict[str, list[list[Bar]]] = {}
        for comm_type in options.comm_types:
            rounds = [read_rounds(_path(folder, comm_type, rank), options.device) for rank in range(options.ranks)]
            chosen = shortest(rounds, together=options.device == "cpu")
            results[comm_type] = [
                bars(ranges, posted(strategy_of(options, comm_type, rank).plan), options.device)
                for rank, ranges in enumerate(chosen)
            ]

    facts = report.machine()
    where = (
        f"{options.ranks} processes on {facts['cores']} cores"
        if options.device == "cpu"
        else f"{options.ranks} simulated ranks on one GPU, one after another"
    )
    what = (
        f"One causal layer, forward and backward, {options.tokens:,} tokens, {options.heads} query heads on "
        f"{options.kv_heads} key heads of {options.head_dim}, {options.dtype}; {where}"
    )
    travelling = (
        "Messages are drawn from when they were posted until they had been waited for, which is the longest that they "
        "can have taken; what a rank waits for them is drawn as it was."
        if options.device == "cpu"
        else "Kernels and copies are drawn as the device did them."
    )
    text = (
        f"{report.described(facts)}\n\n{what}. Of {options.rounds} rounds the shortest. Above, what a rank computes, "
        "with the number of its step; below, what travels meanwhile: keys to the step of that number, and gradients "
        f"of the keys of that step. {travelling}\n\n![Timeline of every rank](trace.png)\n\n"
        "Milliseconds of the rank that computes, by what it does, and how much of them it waits for messages:\n\n"
        f"{table(results, options.device)}"
    )
    data = {
        "machine": facts,
        "options": {k: str(v) for k, v in vars(options).items() if k not in ("output", "traces")},
    }
    data["bars"] = {
        comm_type: [[[*bar[:4], round(bar.start, 3), round(bar.end, 3)] for bar in drawn] for drawn in by_rank]
        for comm_type, by_rank in results.items()
    }
    report.write(options.output, "trace", "When kernels run and messages travel", text, data)
    plot(results, what.replace("; ", "\n")).savefig(options.output / "trace.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
