"""Benchmark of dynamic against static context parallelism, on samples of log-normal lengths, 1K to 16K tokens.

    python -m benchmarks.dynamic

**Measured**, on two CPU processes over gloo: forward and backward of a small Qwen3 under DDP. The same global batches
run in turns with static CP (one sample a run, split over both ranks) and with dynamic CP. **Counted**, at four ranks:
pairs and tokens that each rank computes, and the work that it waits for. **Simulated**, on nodes of 8 H100s with
`hf_context_parallel.planning.machine`: an 8B Llama at 8, 64 and 1,024 ranks, for

    one by one    static CP of 8 ranks, one sample a run
    packed        static CP of 8 ranks, each group's samples packed in the order in which they came
    greedy        Megatron-LM's rule (`hf_context_parallel/dynamic/megatron_rule.py`), in groups of up to all ranks
    ours          `hf_context_parallel.dynamic.schedule`
    most          an upper bound: every rank computes its share of pairs and tokens, and never waits

If ranks keep whole weights, they wait only for the ranks of their group. If FSDP2 shards weights over a node, weights
are gathered for every run, and ranks wait for all ranks of their node. At the end of a step all ranks wait for all.
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
from hf_context_parallel.distributed.worker_pool import WorkerPool
from hf_context_parallel.dynamic.costs import LLAMA_8B, Costs, counts
from hf_context_parallel.dynamic.groups import Schedule, capacity
from hf_context_parallel.dynamic.megatron_rule import greedy_stages
from hf_context_parallel.dynamic.schedule import in_order, make_schedule
from hf_context_parallel.dynamic.scheduler import Scheduler, model_shape
from hf_context_parallel.planning.balanced import padded_layout
from hf_context_parallel.planning.machine import CPU, H100_NODE

from . import report

NODE = H100_NODE.node
SETTINGS = {"whole weights": False, "weights sharded over a node": True}
"""Settings, and True for those in which ranks wait for each other in every run, since weights are gathered."""
SHORTEST, LONGEST = 1024, 16384
TIMEOUT = 3600


def long_tailed(samples: int, seed: int, scale: int = 1) -> list[int]:
    """Draw log-normal lengths with a median of 3,000 tokens, from 1K to 16K, all divided by `scale`."""
    draws = np.random.default_rng(seed).lognormal(np.log(3000), 0.8, samples)
    return (np.clip(draws, SHORTEST, LONGEST) // scale).astype(int).tolist()


def waiting_for_nodes(schedule: Schedule) -> float:
    """Seconds of a schedule if ranks wait for the ranks of their node in every round."""
    by_node = schedule.work.reshape(len(schedule.rounds), -1, min(NODE, schedule.ranks))
    return float(by_node.max(axis=2).sum(axis=0).max())


def stages_of_greedy_rule(
    lengths: Sequence[int], ranks: int, most: int, costs: Costs, node: int = 1
) -> list[np.ndarray]:
    """Seconds of each of `node` ranks for a stage of the greedy rule.

    A group runs its samples one after another. If the ranks of a node wait for each other, their nth runs take as long
    as the slowest of them.
    """
    found = []
    powers = [2**power for power in range(ranks.bit_length())]
    chosen = [next(size for size in powers if size * most >= length) for length in lengths]
    for groups in greedy_stages(lengths, chosen, ranks, powers):
        longest = max(len(group.samples) for group in groups)
        runs = np.zeros((ranks, longest))
        first = 0
        for group in sorted(groups, key=lambda group: -group.size):
            own = np.array([lengths[sample] for sample in group.samples])
            runs[first : first + group.size, : len(own)] = costs.rows(own, np.ones_like(own), group.size)
            first += group.size
        found.append(runs.reshape(ranks // node, node, longest).max(axis=1).sum(axis=1))
    return found


def simulated(ranks: int, most: int, samples: int, steps: int) -> dict[str, Any]:
    """Simulate the tokens a second of each way, and measure the seconds of planning ours.

    A global batch has `samples` samples for each rank.
    """
    rates: dict[str, dict[str, list[float]]] = {}
    idle, planning = [], []
    for setting, sharded in SETTINGS.items():
        costs, by_way = Costs.of(LLAMA_8B, H100_NODE, sharded), rates.setdefault(setting, {})
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
                "most": sum(costs.pair * length * (length + 1) / 2 + costs.token * length for length in lengths)
                / ranks,
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
                if way not in ("ours", "most")
            }
            for setting, by_way in rates.items()
        },
        "idle": mean(idle),
        "planning": median(planning),
    }


def counted(ranks: int, extent: int, most: int, samples: int, shape: Any) -> dict[str, dict[str, Any]]:
    """Count the work of each rank, in floating-point operations, and the work that it waits for.

    With whole weights, a rank waits in each run for the ranks of its group, and for all ranks at the end. With sharded
    weights, it waits in each run for all ranks.
    """
    lengths = long_tailed(samples, seed=1)
    found: dict[str, dict[str, Any]] = {}
    for setting, sharded in SETTINGS.items():
        rates = Costs.of(shape, CPU, sharded)
        operations = Costs.of(shape, replace(CPU, forward=1, backward=1, linear=1))
        work = Costs(pair=operations.pair, token=operations.token, in_step=sharded)
        schedules = {
            "one by one": in_order(lengths, ranks, extent, 0, work),
            "dynamic": make_schedule(lengths, ranks, extent, most, rates),
        }
        found[setting] = {way: _counted(schedule, work) for way, schedule in schedules.items()}
    return found


def _counted(schedule: Schedule, work: Costs) -> dict[str, Any]:
    by_rank, last = np.zeros((len(schedule.rounds), schedule.ranks)), replace(schedule, costs=work).total
    for number, groups in enumerate(schedule.rounds):
        for first, size, members in groups:
            if members:
                own = np.array([schedule.lengths[sample] for sample in members])
                [pairs], _ = counts(own, np.array([len(own)]), size)
                tokens = padded_layout("zigzag", own.sum().item(), size).length / size
                by_rank[number, first : first + size] = work.pair * pairs + work.token * tokens
    return {
        "rounds": len(schedule.rounds),
        "last": last,
        "work": by_rank.sum(axis=0).tolist(),
        "idle": (last - by_rank.sum(axis=0)).tolist(),
        "timeline": [
            [[first, size, float(by_rank[number, first])] for first, size, _ in groups]
            for number, groups in enumerate(schedule.rounds)
        ],
    }


def small_config() -> Any:
    """Config of a Qwen3 that is small enough for 16K tokens on a core."""
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


def measured(most: int, samples: int, batches: int, rounds: int, scale: int) -> list[dict[str, list[float]]]:
    """Measure the seconds of global batches, with static and dynamic CP in turns. All ranks return the same."""
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

    def step(runs, batch) -> tuple[float, float]:
        """Measure the seconds of a step, and the norm of the gradients."""
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
        seconds = time.perf_counter() - begin
        norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()
        model.zero_grad()
        return seconds, norm

    ways = {"one by one": static, "dynamic": dynamic}
    found = []
    for number in range(batches):
        batch = []
        for sample, length in enumerate(long_tailed(samples, seed=number, scale=scale)):
            generator = torch.Generator().manual_seed(sample)
            input_ids = torch.randint(3, 384, (1, length), generator=generator)
            batch.append({"input_ids": input_ids, "labels": input_ids})
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            norms = {}
            for way in list(ways)[:: -1 if turn % 2 else 1]:
                seconds, norms[way] = step(ways[way], batch)
                if turn:  # the first turn warms up
                    taken[way].append(seconds)
            if abs(norms["dynamic"] / norms["one by one"] - 1) > 1e-4:
                raise AssertionError(f"gradient norms differ: {norms}")
        found.append(taken)
    return found


def plot(counted_work: dict[str, Any], simulations: list[dict[str, Any]]) -> Figure:
    """Draw the times of the work of four ranks (left), and simulated tokens a second over static CP (right)."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    setting = "weights sharded over a node"
    axes = left.subplots(2, 1, sharex=True)
    colours = {1: "C0", 2: "C1", 4: "C2", 8: "C3"}
    for axis, (way, facts) in zip(axes, counted_work[setting].items()):
        begin = 0.0
        for groups in facts["timeline"]:
            for first, size, work in groups:
                if work:
                    axis.broken_barh(
                        [(begin, work)], (first, size), facecolor=colours[size], edgecolor="white", label=f"CP {size}"
                    )
            begin += max(work for _, _, work in groups)
        axis.set_title(f"{way}, {setting}:\nwork of each rank; white is idle")
        axis.set_ylabel("rank")
        axis.set_yticks(range(len(facts["work"]) + 1))
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    axes[0].legend(handles.values(), handles.keys(), loc="upper right")
    axes[1].set_xlabel("floating-point operations")
    axis = right.subplots()
    names = [f"{result['ranks']:,}\n{result['max_tokens_per_rank']:,}" for result in simulations]
    ways = [way for way in simulations[0]["tokens_per_second"][setting] if way != "most"]
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
    parser.add_argument("--ranks", type=report.comma_separated(int), default=[8, 64, 1024], help="numbers of ranks")
    parser.add_argument("--most", type=report.comma_separated(int), default=[2048, 4096, 8192], help="tokens a rank")
    parser.add_argument("--steps", type=int, default=5, help="global batches that are simulated")
    parser.add_argument("--samples", type=int, default=4, help="samples for each rank in a global batch")
    parser.add_argument("--batches", type=int, default=4, help="global batches that are measured")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--scale", type=int, default=1, help="divides the lengths that are measured")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for dynamic.md, .png and .json")
    options = parser.parse_args(arguments)

    here = importlib.import_module("benchmarks.dynamic")  # under the name by which workers import it
    workers = WorkerPool(2, TIMEOUT)
    try:
        holds = LONGEST // 2 // options.scale
        sizes = (4 * options.samples, options.batches, options.rounds, options.scale)
        seconds = workers(2, here.measured, holds, *sizes)[0]
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


def _measured_section(seconds: list[dict[str, list[float]]], options: argparse.Namespace) -> str:
    rows = []
    for number, taken in enumerate(seconds):
        static, dynamic = taken["one by one"], taken["dynamic"]
        ratios = sorted(one / other for one, other in zip(static, dynamic))
        rows.append(
            (
                number,
                f"{median(static):.2f}",
                f"{median(dynamic):.2f}",
                f"{median(ratios):.3f}",
                f"{ratios[0]:.3f} to {ratios[-1]:.3f}",
            )
        )
    return "\n\n".join(
        [
            "## Measured: 2 CPU ranks",
            f"{4 * options.samples} samples a global batch, each batch {options.rounds} times by both ways in turns; "
            f"a rank holds at most {LONGEST // 2 // options.scale:,} tokens. Gradients have been compared. Two ranks "
            "that share every sample have the same work already: what is left to gain is what they send and wait for.",
            report.table(["batch", "one by one, s", "dynamic, s", "speed, median", "speed, range"], rows),
        ]
    )


def _counted_section(work: dict[str, Any]) -> str:
    parts = [
        "## Counted: 4 ranks, static CP 2",
        "Pairs and tokens of each rank as GFLOP, and what it waits. With whole weights, as under DDP, it waits for "
        "the ranks of its group in each run and for all in the end, so the last to be done never waits; where weights "
        "are gathered for each run, as under FSDP2, it waits for all in each.",
    ]
    for setting, ways in work.items():
        rows = [
            (
                f"rank {rank}",
                *(f"{facts[key][rank] / 1e9:,.1f}" for facts in ways.values() for key in ("work", "idle")),
            )
            for rank in range(4)
        ]
        static, dynamic = ways["one by one"], ways["dynamic"]
        less = sum(ours < other for ours, other in zip(dynamic["idle"], static["idle"]))
        parts += [
            f"### {setting.capitalize()}",
            report.table(["", "one by one: work", "idle", "dynamic: work", "idle"], rows),
            f"All are done after {static['last'] / 1e9:,.1f} one by one ({static['rounds']} "
            f"rounds) and {dynamic['last'] / 1e9:,.1f} dynamic ({dynamic['rounds']} rounds): "
            f"{static['last'] / dynamic['last']:.2f} times. Less idle work on {less} of 4 ranks; all together "
            f"{sum(static['idle']) / 1e9:,.1f} and {sum(dynamic['idle']) / 1e9:,.1f}.",
        ]
    return "\n\n".join(parts)


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
                    f"{rates['ours'] / rates['most']:.2f}",
                    f"{result['planning']:.2f}",
                )
            )
            exceptions += [
                f"{result['ranks']:,} ranks of {result['max_tokens_per_rank']:,} tokens, {setting}: slower than {way} "
                "on some batch"
                for way, never in result["never_slower"][setting].items()
                if not never
            ]
    headers = ["ranks", "tokens a rank", "weights", "one by one", "packed", "greedy", "ours", "most"]
    headers += ["ours / one by one", "ours / packed", "ours / greedy", "ours / most", "seconds to plan"]
    return "\n\n".join(
        [
            "## Simulated: nodes of 8 H100s",
            f"An 8B Llama, bfloat16, {options.samples} samples a rank in a global batch, {options.steps} batches; "
            "tokens a second and rank. By the greedy rule ranks differ in how often they run, which sharded weights "
            "do not allow; there, ranks are taken to wait for each other all the same. The most is what ranks "
            "without a wait or a message would do: no schedule gets past it.",
            report.table(headers, rows),
            "\n".join(f"- {line}" for line in exceptions) or "Ours was not slower than any other way on any batch.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
