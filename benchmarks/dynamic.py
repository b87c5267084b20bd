"""Dynamic context parallelism against static: samples of long-tailed lengths, 1K to 16K tokens, log-normal.

    python -m benchmarks.dynamic

**Measured**, on two CPU processes over gloo: a small Qwen3 under DDP, forward and backward of the same global batches,
static CP (one sample a run, split over both ranks) and dynamic in turns. **Counted**, at four ranks: pairs and tokens
that each rank computes. **Simulated**, on nodes of 8 H100s with `hf_context_parallel.cost`: an 8B Llama at 8, 64 and
1,024 ranks, for

    one by one    static CP of 8 ranks, one sample a run
    packed        static CP of 8 ranks, each group's samples packed in the order in which they came
    greedy        Megatron-LM's rule (`benchmarks/greedy.py`)
    ours          `hf_context_parallel.schedule`

Where ranks keep whole weights they wait only for the ranks of their group; where FSDP2 shards weights over a node,
which are gathered for every run, they wait for the node's. All wait for all at the end of a step.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

import hf_context_parallel as hcp
from hf_context_parallel.balance import padded_layout
from hf_context_parallel.cost import CPU, H100_NODE
from hf_context_parallel.dynamic import Scheduler, model_shape
from hf_context_parallel.schedule import (
    LLAMA_8B,
    Costs,
    Schedule,
    capacity,
    counts,
    in_order,
    make_schedule,
)
from hf_context_parallel.workers import WorkerPool

from . import report
from .greedy import greedy_stages

NODE = H100_NODE.node
SHORTEST, LONGEST = 1024, 16384
TIMEOUT = 3600


def long_tailed(samples: int, seed: int, scale: int = 1) -> list[int]:
    """Log-normal lengths with a median of 3,000 tokens, from 1K to 16K; all divided by `scale`."""
    draws = np.random.default_rng(seed).lognormal(np.log(3000), 0.8, samples)
    return (np.clip(draws, SHORTEST, LONGEST) // scale).astype(int).tolist()


def waiting_for_nodes(schedule: Schedule) -> float:
    """What a schedule takes where ranks wait for those of their node in every round."""
    by_node = schedule.work.reshape(len(schedule.rounds), -1, min(NODE, schedule.ranks))
    return float(by_node.max(axis=2).sum(axis=0).max())


def stages_of_greedy_rule(
    lengths: Sequence[int], ranks: int, most: int, costs: Costs, node: int = 1
) -> list[np.ndarray]:
    """What each of `node` ranks takes for a stage of the greedy rule.

    A group runs its samples one after another. Where a node's ranks wait for each other, their nth runs take as long
    as the slowest of them.
    """
    found = []
    for groups in greedy_stages(lengths, ranks, most):
        longest = max(len(group.samples) for group in groups)
        runs = np.zeros((ranks, longest))
        first = 0
        for group in sorted(groups, key=lambda group: -group.size):
            for number, sample in enumerate(group.samples):
                layout = padded_layout("zigzag", lengths[sample], group.size)
                runs[first : first + group.size, number] = costs.row([lengths[sample]], layout)
            first += group.size
        found.append(runs.reshape(ranks // node, node, longest).max(axis=1).sum(axis=1))
    return found


def simulated(ranks: int, most: int, samples: int, steps: int) -> dict[str, Any]:
    """Tokens a second of each way, for `samples` a rank in a global batch, and the seconds that ours is planned in."""
    rates: dict[str, dict[str, list[float]]] = {"whole weights": {}, "weights sharded over a node": {}}
    idle, planning = [], []
    for sharded, by_way in enumerate(rates.values()):
        costs = Costs.of(LLAMA_8B, H100_NODE, bool(sharded))
        measure = waiting_for_nodes if sharded else lambda schedule: schedule.total
        for seed in range(steps):
            lengths = long_tailed(samples * ranks, seed)
            begin = time.perf_counter()
            ours = make_schedule(lengths, ranks, NODE, most, costs)
            planning.append(time.perf_counter() - begin)
            stages = stages_of_greedy_rule(lengths, ranks, most, costs, NODE if sharded else 1)
            seconds = {
                "one by one": measure(in_order(lengths, ranks, NODE, 0, costs)),
                "packed": measure(in_order(lengths, ranks, NODE, capacity(NODE, most), costs)),
                "greedy": float(sum(stage.max() for stage in stages)),
                "ours": measure(ours),
            }
            idle.append(float(ours.idle.mean()))
            for way, value in seconds.items():
                by_way.setdefault(way, []).append(sum(lengths) / value)
    return {
        "ranks": ranks,
        "max_tokens_per_rank": most,
        "tokens_per_second": {
            setting: {way: mean(values) for way, values in by_way.items()} for setting, by_way in rates.items()
        },
        "never_slower": {
            setting: {
                way: all(ours >= other for ours, other in zip(by_way["ours"], values))
                for way, values in by_way.items()
                if way != "ours"
            }
            for setting, by_way in rates.items()
        },
        "idle": mean(idle),
        "planning": median(planning),
    }


def counted(ranks: int, extent: int, most: int, samples: int, shape: Any) -> dict[str, Any]:
    """Each rank's work, in floating-point operations, and how much it waits: in each run for the ranks of its group,
    and for all in the end, as under DDP, which reduces gradients once."""
    lengths = long_tailed(samples, seed=1)
    rates = Costs.of(shape, CPU)
    work = Costs(pair=rates.pair * CPU.attention, token=rates.token * CPU.linear)
    schedules = {
        "one by one": in_order(lengths, ranks, extent, 0, work),
        "dynamic": make_schedule(lengths, ranks, extent, most, rates),
    }
    found = {}
    for way, schedule in schedules.items():
        by_rank, last = np.zeros((len(schedule.rounds), ranks)), replace(schedule, costs=work).total
        for number, groups in enumerate(schedule.rounds):
            for first, size, members in groups:
                own = [lengths[sample] for sample in members]
                layout = padded_layout("zigzag", sum(own), size)
                if own:
                    pairs, _ = counts(own, layout)
                    by_rank[number, first : first + size] = work.pair * np.array(pairs) + work.token * (
                        layout.length / size
                    )
        found[way] = {
            "rounds": len(schedule.rounds),
            "slowest": last,
            "work": by_rank.sum(axis=0).tolist(),
            "idle": (last - by_rank.sum(axis=0)).tolist(),
            "timeline": [
                [[first, size, float(by_rank[number, first])] for first, size, _ in groups]
                for number, groups in enumerate(schedule.rounds)
            ],
        }
    return found


def small_config() -> Any:
    """A Qwen3 small enough for 16K tokens on a core."""
    return AutoConfig.for_model(
        "qwen3",
        vocab_size=384,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )


def measured(most: int, samples: int, rounds: int, scale: int) -> dict[str, list[float]]:
    """Seconds of global batches, run by static CP and dynamically in turns, on each rank alike."""
    torch.manual_seed(0)
    size = dist.get_world_size()
    settings = {"size": size, "dynamic": True, "max_tokens_per_rank": most}
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(**settings))
    model = AutoModelForCausalLM.from_config(small_config(), attn_implementation="context_parallel")
    model = DistributedDataParallel(model)
    scheduler = Scheduler(cp, model)

    def static(batch: list[dict[str, torch.Tensor]]) -> list[tuple[int, dict]]:
        return [(size, sample) for sample in batch]

    def dynamic(batch: list[dict[str, torch.Tensor]]) -> list[tuple[int, dict]]:
        return [(round.size, round.batch) for round in scheduler.rounds(batch)]

    def seconds(runs, batch) -> float:
        dist.barrier()
        begin = time.perf_counter()
        targets = sum(sample["labels"].shape[1] - 1 for sample in batch)
        listed = runs(batch)
        for number, (group, inputs) in enumerate(listed, start=1):
            cp.switch(group)
            model.require_backward_grad_sync = number == len(listed)
            with cp.shard({**inputs, "num_items_in_batch": targets}, model) as local:
                model(**local).loss.backward()
        cp.switch(size)
        dist.barrier()
        norms.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item())
        model.zero_grad()
        return time.perf_counter() - begin

    found: dict[str, list[float]] = {"one by one": [], "dynamic": []}
    norms: list[float] = []
    for number in range(rounds + 1):
        batch = []
        for sample, length in enumerate(long_tailed(samples, seed=number, scale=scale)):
            generator = torch.Generator().manual_seed(sample)
            input_ids = torch.randint(3, 384, (1, length), generator=generator)
            batch.append({"input_ids": input_ids, "labels": input_ids})
        for name, runs in (("one by one", static), ("dynamic", dynamic)):
            taken = seconds(runs, batch)
            if number:  # the first is for warming up
                found[name].append(taken)
        if abs(norms[-1] / norms[-2] - 1) > 1e-4:
            raise AssertionError(f"gradient norms differ: {norms[-2]} one by one, {norms[-1]} dynamic")
    return found


def plot(counted_work: dict[str, Any], simulations: list[dict[str, Any]]) -> Figure:
    """Left, what four ranks do and when; right, tokens a second by simulation, as multiples of static CP's."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.subplots(2, 1, sharex=True)
    colours = {1: "C0", 2: "C1", 4: "C2", 8: "C3"}
    for axis, (way, facts) in zip(axes, counted_work.items()):
        begin = 0.0
        for groups in facts["timeline"]:
            for first, size, work in groups:
                if work:
                    axis.broken_barh(
                        [(begin, work)], (first, size), facecolor=colours[size], edgecolor="white", label=f"CP {size}"
                    )
            begin += max(work for _, _, work in groups)
        axis.set_title(f"{way}: work of each rank; white is idle")
        axis.set_ylabel("rank")
        axis.set_yticks(range(len(facts["work"]) + 1))
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    axes[0].legend(handles.values(), handles.keys(), loc="upper right")
    axes[1].set_xlabel("floating-point operations")
    axis = right.subplots()
    setting = "weights sharded over a node"
    names = [f"{result['ranks']:,}\n{result['max_tokens_per_rank']:,}" for result in simulations]
    ways = list(simulations[0]["tokens_per_second"][setting])
    for number, way in enumerate(ways):
        values = [
            result["tokens_per_second"][setting][way] / result["tokens_per_second"][setting]["one by one"]
            for result in simulations
        ]
        axis.bar(np.arange(len(names)) + number / (len(ways) + 1), values, 1 / (len(ways) + 1), label=way)
    axis.set_xticks(np.arange(len(names)) + 0.3, names, fontsize=7)
    axis.set_title(f"Simulated tokens/s with {setting},\nas multiples of one by one")
    axis.set_xlabel("ranks, and tokens that a rank may hold")
    axis.legend(loc="lower left", framealpha=1)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=report.comma_separated(int), default=[8, 64, 1024], help="simulated")
    parser.add_argument("--most", type=report.comma_separated(int), default=[2048, 4096, 8192], help="tokens a rank")
    parser.add_argument("--steps", type=int, default=5, help="global batches that are simulated")
    parser.add_argument("--samples", type=int, default=4, help="a rank and global batch")
    parser.add_argument("--rounds", type=int, default=5, help="global batches that are measured")
    parser.add_argument("--scale", type=int, default=1, help="divides the lengths that are measured")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for dynamic.md, .png and .json")
    options = parser.parse_args(arguments)

    here = importlib.import_module("benchmarks.dynamic")  # under the name by which the workers find it
    workers = WorkerPool(2, TIMEOUT)
    try:
        holds = LONGEST // 2 // options.scale
        seconds = workers(2, here.measured, holds, 4 * options.samples, options.rounds, options.scale)[0]
    finally:
        workers.close()
    shape = model_shape(AutoModelForCausalLM.from_config(small_config()))
    work = counted(4, 2, LONGEST // 2, 8 * options.samples, shape)
    simulations = [
        simulated(ranks, most, options.samples, options.steps) for ranks in options.ranks for most in options.most
    ]

    facts = report.machine()
    text = "\n\n".join(
        [
            report.described(facts),
            "![Four ranks' work, and simulated throughput](dynamic.png)",
            _measured_section(seconds, options),
            _counted_section(work),
            _simulated_section(simulations, options),
        ]
    )
    data = {"machine": facts, "seconds": seconds, "counted": work, "simulated": simulations}
    report.write(options.output, "dynamic", "Dynamic against static context parallelism", text, data)
    plot(work, simulations).savefig(options.output / "dynamic.png", dpi=120)
    return 0


def _measured_section(seconds: dict[str, list[float]], options: argparse.Namespace) -> str:
    rows = [
        (way, f"{median(values):.2f}", f"{median(seconds['one by one']) / median(values):.2f}")
        for way, values in seconds.items()
    ]
    slower = sum(ours > static for ours, static in zip(seconds["dynamic"], seconds["one by one"]))
    return "\n\n".join(
        [
            "## Measured: 2 CPU ranks",
            f"{4 * options.samples} samples a global batch, {options.rounds} batches, in turns; a rank holds at most "
            f"{LONGEST // 2 // options.scale:,} tokens. Gradients have been compared.",
            report.table(["way", "seconds, median", "speed"], rows),
            f"Dynamic was slower than static on {slower} of {options.rounds} batches.",
        ]
    )


def _counted_section(work: dict[str, Any]) -> str:
    rows = []
    for rank in range(4):
        rows.append(
            (
                f"rank {rank}",
                *(f"{facts[key][rank] / 1e9:,.1f}" for facts in work.values() for key in ("work", "idle")),
            )
        )
    static, dynamic = work["one by one"], work["dynamic"]
    less = sum(ours < other for ours, other in zip(dynamic["idle"], static["idle"]))
    return "\n\n".join(
        [
            "## Counted: 4 ranks, static CP 2",
            "Pairs and tokens of each rank as GFLOP, and what it waits: for the ranks of its groups, and for all in "
            "the end.",
            report.table(["", "one by one: work", "idle", "dynamic: work", "idle"], rows),
            f"The last rank is done after {static['slowest'] / 1e9:,.1f} one by one ({static['rounds']} "
            f"rounds) and {dynamic['slowest'] / 1e9:,.1f} dynamic ({dynamic['rounds']} rounds): "
            f"{static['slowest'] / dynamic['slowest']:.2f} times. Less idle work on {less} of 4 ranks.",
        ]
    )


def _simulated_section(simulations: list[dict[str, Any]], options: argparse.Namespace) -> str:
    rows, exceptions = [], []
    for result in simulations:
        for setting, rates in result["tokens_per_second"].items():
            rows.append(
                (
                    f"{result['ranks']:,}",
                    f"{result['max_tokens_per_rank']:,}",
                    setting,
                    *(f"{rates[way] / result['ranks']:,.0f}" for way in rates),
                    f"{rates['ours'] / rates['one by one']:.2f}",
                    f"{rates['ours'] / rates['packed']:.2f}",
                    f"{rates['ours'] / rates['greedy']:.2f}",
                    f"{result['planning']:.2f}",
                )
            )
            exceptions += [
                f"{result['ranks']:,} ranks of {result['max_tokens_per_rank']:,} tokens, {setting}: slower than {way} "
                "on some batch"
                for way, never in result["never_slower"][setting].items()
                if not never
            ]
    headers = ["ranks", "tokens a rank", "weights", "one by one", "packed", "greedy", "ours"]
    headers += ["ours / one by one", "ours / packed", "ours / greedy", "seconds to plan"]
    return "\n\n".join(
        [
            "## Simulated: nodes of 8 H100s",
            f"An 8B Llama, bfloat16, {options.samples} samples a rank in a global batch, {options.steps} batches; "
            "tokens a second and rank. By the greedy rule ranks differ in how often they run, which sharded weights "
            "do not allow; there, ranks are taken to wait for each other all the same.",
            report.table(headers, rows),
            "\n".join(f"- {line}" for line in exceptions) or "Ours was not slower than any other way on any batch.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
