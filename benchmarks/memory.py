"""Benchmark of memory: the peak of a step of training beside what `hf_context_parallel/memory/` counts.

    python -m benchmarks.memory                  # on processes of the CPU
    python -m benchmarks.memory --only time      # the step with kept attention alone; the rest of the page stays
    python -m benchmarks.memory --device cuda    # on one GPU: Llama-3.1-8B with LoRA

**Counted** on the CPU is the resident memory of a process at its peak (`VmHWM`) above that before the model was made:
weights, gradients, states, activations, and buffers. What libraries take once is there before. The C library is told
to return blocks of 64 KiB and more when they are freed, so memory that is free counts no more.

**Peak**: a step of a small Llama in float32 with AdamW, one option added at a time, for groups of 1, 2 and 4 ranks.
A group of one rank runs the attention of Transformers, or ours where attention is kept.

**Longest**: the longest sequence whose peak is within a budget for each rank, by bisection.

**Heads**: attention alone, forward and backward, with its heads in groups that are computed one after another.

**Time**: a step with kept attention beside one without, both with gradient checkpointing, in turns.

**GPU**: the slopes of the peak by layers and by tokens, and what they say of all layers on 80 GB; and one step on
500,000 tokens, while PyTorch may take 80 GB. Without a GPU the bytes of `parts_of` stand in their place, and the
result is marked as projected.

The status is 1 if a peak on the CPU is more than 10% off.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedConfig

import hf_context_parallel as hcp
from hf_context_parallel.attention.prepared import LONG
from hf_context_parallel.distributed import buffers
from hf_context_parallel.distributed.worker_pool import WorkerPool
from hf_context_parallel.integration.switches import sharded_on_one_rank
from hf_context_parallel.memory.facts import ModelFacts, facts_of
from hf_context_parallel.memory.job import Job
from hf_context_parallel.memory.parts import parts_of
from hf_context_parallel.planning.machine import attention_flops
from hf_context_parallel.sizing.speed import model_flops, work_of
from hf_context_parallel.trainer.memory import PeakMemory

from . import report
from .turns import in_turns, timed

TIMEOUT = 900
MIB, GB = 2**20, 1e9
M_MMAP_THRESHOLD = -3
"""Parameter of mallopt(3): the fewest bytes of a block that is mapped by itself, and unmapped when it is freed."""
OFF = 0.10
"""Largest difference of a peak from its count."""
SIZES = {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 8, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 2**20}
NARROW = {**SIZES, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 32}
"""Model whose work is attention, for the time of steps: 4 heads of 32, and little else."""
LLAMA = {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 2**20}
WARM_TOKENS = 2048
"""Tokens of the steps before the one that is measured. In a first one, of another model, libraries take what they take
once, and in a second one the optimizer makes its states."""
HEADS, HEAD_DIM, GROUPS = 8, 64, (1, 2, 4, 8)
"""Heads of the layer whose heads are grouped, each with a key head of its own, and the numbers of groups."""
LORA_RANK = 16
GPU_JOB = {"dtype": torch.bfloat16, "kernel": "torch"}
AIM_TOKENS, AIM_BYTES = 500_000, 80 * GB
AIM_LAYERS, AIM_WINDOW = 8, 1024
"""Layers of the step on `AIM_TOKENS`, whose checkpoints and attention are kept on a host of 128 GB, and the window of
their attention. The buffers of attention are as large without a window, and computing takes minutes."""


@dataclass(frozen=True)
class Option:
    """Options of a run, beside the ranks.

    Args:
        name: words for tables.
        checkpointing: whether layers are computed again.
        settings: fields of `ContextParallelConfig`.
        offload: whether the inputs of layers are kept on the host.
    """

    name: str
    checkpointing: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    offload: bool = False

    @property
    def shards_alone(self) -> bool:
        """True if a group of one rank shards its batch. Otherwise it runs the attention of Transformers."""
        settings = dict(self.settings)
        return settings.get("attention_checkpoints", "off") != "off" or "tile_tokens" in settings

    @property
    def is_there(self) -> bool:
        """True if this version has the settings."""
        return all(name in hcp.ContextParallelConfig.__dataclass_fields__ for name, _ in self.settings)


KEPT = (("attention_checkpoints", "device"),)
CHECKPOINTS = Option("gradient checkpointing", True, (("attention_checkpoints", "off"),))
KEEPS = Option("+ kept attention", True, KEPT)
OPTIONS = (
    Option("no option"),
    CHECKPOINTS,
    KEEPS,
    Option("+ tiles of 256 tokens", True, (*KEPT, ("tile_tokens", 256))),
)
TILES = ("tile_tokens", 4096)
ON_HOST = (TILES, ("attention_checkpoints", "host"))
ON_GPU = (
    CHECKPOINTS,
    KEEPS,
    Option("+ tiles of 4,096 tokens", True, (*KEPT, TILES)),
    Option("+ checkpoints and kept attention on the host", True, ON_HOST, offload=True),
)


def job_of(facts: ModelFacts, tokens: int, ranks: int, option: Option, **changes: Any) -> Job:
    job = Job(facts, tokens, cp=ranks, dtype=torch.float32, kernel="cpu", checkpointing=option.checkpointing)
    settings = dict(option.settings)
    return replace(job, sharded=option.shards_alone, offload=option.offload, **settings, **changes)


def model_of(sizes: dict[str, int], option: Option, **settings: Any) -> LlamaForCausalLM:
    """Make a Llama with random weights, prepared for groups of all ranks."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="context_parallel").train()
    if option.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    size = dist.get_world_size() if dist.is_initialized() else 1
    config = hcp.ContextParallelConfig(size=size, comm_type="p2p", **dict(option.settings), **settings)
    return hcp.parallelize(model, hcp.ContextParallel(config))


def stepper(model: torch.nn.Module, tokens: int) -> Callable[..., float]:
    """Return a function that takes a step of AdamW on one row, or on its first tokens, and returns its seconds.

    Ranks average their gradients in place. DDP would hold them once more.
    """
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(model.parameters()).device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)

    def step(first: int = tokens) -> float:
        begin, row = time.perf_counter(), ids[:, :first]
        model(input_ids=row, labels=row).loss.backward()
        if dist.is_initialized():
            for parameter in trained:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    return step


def peak(option: Option, tokens: int) -> tuple[float, float]:
    """Measure the bytes of a rank at the peak of a step, and its seconds."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    stepper(model_of(SIZES, option), WARM_TOKENS)()  # what libraries take once
    buffers._pool = buffers.BufferPool()  # what earlier runs have left in it would not count
    gc.collect()
    watch = PeakMemory(torch.device("cpu"))
    watch.start()
    step = stepper(model_of(SIZES, option), tokens)
    step(WARM_TOKENS)
    seconds = step()
    return watch.peak() * 2**30, seconds


def peak_on(ranks: int, option: Option, tokens: int) -> tuple[float, float]:
    """Measure the bytes of the rank that needs most, and the seconds of the slowest.

    Processes that have measured before hold memory of it, which would be used again and not count.
    """
    found = on_ranks(ranks, peak, option, tokens)
    return max(high for high, _ in found), max(seconds for _, seconds in found)


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a function on new processes, and return the results."""
    pool = WorkerPool(ranks, TIMEOUT)
    try:
        return pool(ranks, function, *arguments)
    finally:
        pool.close()


def peaks(ranks: list[int], options: list[Option], lengths: list[int]) -> Iterator[dict[str, Any]]:
    """Measure all peaks, each beside its count."""
    facts = facts_of(LlamaConfig(**SIZES))
    for number in ranks:
        for option in options:
            for tokens in lengths:
                found, _ = peak_on(number, option, tokens)
                parts = parts_of(job_of(facts, tokens, number, option))
                case = {"ranks": number, "option": option.name, "tokens": tokens, "bytes": found}
                yield case | {"counted": parts.total, "phase": parts.peak}


def longest(ranks: int, option: Option, budget: float, tries: int) -> dict[str, Any]:
    """Find the longest sequence within a budget for each rank, and its tokens per second.

    Bisection begins with a tenth less and a twentieth more than the count says, and ends after `tries` runs.
    """
    guess = longest_counted(facts_of(LlamaConfig(**SIZES)), ranks, option, budget)
    low, high, rate = int(0.9 * guess), int(1.05 * guess), 0.0
    for _ in range(tries):
        middle = (low + high) // 2
        found, seconds = peak_on(ranks, option, middle)
        if found <= budget:
            low, rate = middle, middle / seconds
        else:
            high = middle
    fitted = low if rate else 0
    return {"ranks": ranks, "option": option.name, "tokens": fitted, "counted": guess, "rate": rate}


def longest_counted(facts: ModelFacts, ranks: int, option: Option, budget: float, **changes: Any) -> int:
    """Find the longest sequence that is within a budget by `parts_of`."""
    low, high = 1, 2**30
    while high - low > 1:
        middle = (low + high) // 2
        fits = parts_of(job_of(facts, middle, ranks, option, **changes)).total <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low


def times(tokens: int, rounds: int) -> dict[str, Any]:
    """Measure the seconds of steps with kept attention and without, in turns, and count the work of attention."""
    torch.set_num_threads(1)
    with sharded_on_one_rank():
        steps = {option.name: stepper(model_of(NARROW, option), tokens) for option in (CHECKPOINTS, KEEPS)}
        for step in steps.values():
            step()
        seconds = in_turns(steps, rounds)
    facts = facts_of(LlamaConfig(**NARROW))
    pairs = tokens * (tokens + 1) // 2
    attention = facts.layers * attention_flops(pairs, facts.heads, facts.query_dim, facts.value_dim)
    share = attention / (attention + 2 * tokens * facts.parameters)
    return {"tokens": tokens, "seconds": seconds, "attention": share}


def groups_of_heads(tokens: int, rounds: int) -> dict[str, tuple[float, list[float]]]:
    """Measure attention in each number of groups: the bytes that it adds at its peak, and the seconds of some runs."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    size, high = dist.get_world_size(), {}
    runs = {str(groups): attention_of(groups, tokens // size) for groups in GROUPS}
    for groups, run in runs.items():
        run()
        gc.collect()
        watch = PeakMemory(torch.device("cpu"))
        watch.start()
        run()
        high[groups] = watch.peak() * 2**30
    seconds = in_turns({groups: timed(run, dist.barrier, dist.barrier) for groups, run in runs.items()}, rounds)
    return {groups: (high[groups], seconds[groups]) for groups in runs}


def attention_of(groups: int, tokens: int) -> Callable[[], None]:
    """Return a function that runs attention of this rank's tokens forward and backward."""
    config = hcp.ContextParallelConfig(size=dist.get_world_size(), comm_type="p2p", head_groups=groups)
    cp, random = hcp.ContextParallel(config), torch.Generator().manual_seed(dist.get_rank())
    inputs = [torch.randn(1, HEADS, tokens, HEAD_DIM, generator=random).requires_grad_() for _ in range(3)]

    def run() -> None:
        output = cp.attention(*inputs)
        torch.autograd.grad(output, inputs, output.detach())

    return run


def interval(ratios: list[float]) -> tuple[float, float]:
    """Interval of the median of paired ratios: the ranks of a sign test at about 95%."""
    ordered, away = sorted(ratios), 0.98 * len(ratios) ** 0.5
    middle = (len(ratios) - 1) / 2
    return ordered[max(0, int(middle - away))], ordered[min(len(ratios) - 1, int(middle + away + 1))]


def adapted(config: PreTrainedConfig, option: Option, device: torch.device) -> torch.nn.Module:
    """Make a model in bfloat16 whose adapters alone are trained, as PEFT makes them, prepared with an option."""
    from peft import LoraConfig, get_peft_model

    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="context_parallel", dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.to(torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": False}, offload=option.offload)
    model.enable_input_require_grads()
    return hcp.parallelize(model, hcp.ContextParallel(hcp.ContextParallelConfig(**dict(option.settings))))


def gpu_peak(sizes: dict[str, int], layers: int, option: Option, tokens: int, device: torch.device) -> float:
    """Measure the bytes of the second of two steps, weights included."""
    model = adapted(LlamaConfig(**{**sizes, "num_hidden_layers": layers}), option, device)
    step = stepper(model, tokens)
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    found = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    del step, model
    gc.collect()
    return float(found)


def slopes(option: Option, lengths: list[int], layers: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Measure peaks by layers and tokens, and project all layers of Llama-3.1-8B to 80 GB.

    A peak is taken as `a + b * layers + tokens * (c + d * layers)`, which two lengths and two depths determine.
    """
    found = {(n, tokens): gpu_peak(LLAMA, n, option, tokens, device) for n in layers for tokens in lengths}
    (few, many), (short, long) = layers, (lengths[0], lengths[-1])
    by_tokens = {n: (found[n, long] - found[n, short]) / (long - short) for n in layers}
    fixed = {n: found[n, short] - by_tokens[n] * short for n in layers}
    depth = LLAMA["num_hidden_layers"]
    token = by_tokens[many] + (depth - many) * (by_tokens[many] - by_tokens[few]) / (many - few)
    rest = fixed[many] + (depth - many) * (fixed[many] - fixed[few]) / (many - few)
    return {
        "peaks": [{"layers": n, "tokens": tokens, "bytes": found[n, tokens]} for n, tokens in found],
        "token": token,
        "fixed": rest,
        "longest": int((AIM_BYTES - rest) / token),
    }


def at_the_aim(tokens: int, device: torch.device) -> dict[str, Any]:
    """Measure the first step on `tokens` tokens with all options, in the memory that a GPU of 80 GB has.

    Returns:
        The bytes at the peak, those that PyTorch had taken from the device, and those that `parts_of` counts; and what
        the other layers of Llama-3.1-8B would add, whose checkpoints are on the host.
    """
    option, sizes = ON_GPU[-1], {**LLAMA, "num_hidden_layers": AIM_LAYERS}
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(AIM_BYTES / torch.cuda.get_device_properties(device).total_memory)
        torch.cuda.reset_peak_memory_stats()
    model = adapted(MistralConfig(**sizes, sliding_window=AIM_WINDOW), option, device)
    layer = sum(x.numel() * x.itemsize for x in model.base_model.model.model.layers[0].parameters())
    seconds = stepper(model, tokens)()
    cuda = device.type == "cuda"
    return {
        "tokens": tokens,
        "bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "taken": torch.cuda.max_memory_reserved() if cuda else 0,
        "counted": parts_of(job_of(facts_of(LlamaConfig(**sizes), LORA_RANK), tokens, 1, option, **GPU_JOB)).total,
        "others": (LLAMA["num_hidden_layers"] - AIM_LAYERS) * layer,
        "seconds": seconds,
    }


def projected() -> list[dict[str, Any]]:
    """Count the longest sequence of Llama-3.1-8B with LoRA on GPUs of 80 GB, by option."""
    facts = facts_of(LlamaConfig(**LLAMA), LORA_RANK)
    found = []
    for option in ON_GPU:
        tokens = longest_counted(facts, 1, option, AIM_BYTES, **GPU_JOB)
        parts = parts_of(job_of(facts, tokens, 1, option, **GPU_JOB))
        gib = {part: value / 2**30 for part, value in vars(parts.at_peak).items()}
        many = {
            groups: {n: longest_counted(facts, n, option, AIM_BYTES, head_groups=groups, **GPU_JOB) for n in (2, 4, 8)}
            for groups in (1, None)
        }
        case = {"option": option.name, "tokens": tokens, "phase": parts.peak}
        case |= {"one group": many[1], "groups": many[None]}
        found.append(case | {"gib": gib, "host": parts.host / 2**30})
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", choices=("peak", "longest", "heads", "time", "gpu"), help="one of the measurements alone"
    )
    parser.add_argument("--ranks", type=report.comma_separated(int), default=[1, 2, 4])
    parser.add_argument("--tokens", type=report.comma_separated(int), default=[2048, 4096, 8192])
    parser.add_argument("--budget", type=float, default=128, help="MiB of a rank")
    parser.add_argument("--tries", type=int, default=5, help="runs of a bisection")
    parser.add_argument("--heads-tokens", type=int, default=12_288)
    parser.add_argument("--time-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--gpu-tokens", type=report.comma_separated(int), default=[32_768, 65_536])
    parser.add_argument("--aim-tokens", type=int, default=AIM_TOKENS)
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    return write(options, measured(options))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Take the measurements that are asked for, and keep the others that were written before.

    Settings that this version lacks are left out.
    """
    there = [option for option in OPTIONS if option.is_there]
    written = options.output / "memory.json"
    is_part = options.only is not None or options.device == "cuda"
    data: dict[str, Any] = json.loads(written.read_text(encoding="utf-8")) if is_part and written.exists() else {}
    data["machine"] = report.machine()

    def wanted(name: str) -> bool:
        return options.only in (None, name)

    if options.device == "cuda":
        device = torch.device("cuda")
        ways = [option for option in ON_GPU if option.is_there]
        data["aim"] = at_the_aim(options.aim_tokens, device)
        torch.cuda.empty_cache()
        data["gpu"] = {option.name: slopes(option, options.gpu_tokens, (2, 4), device) for option in ways}
    else:
        if wanted("peak"):
            data["peaks"] = list(peaks(options.ranks, there, options.tokens))
        if wanted("longest"):
            budget = options.budget * MIB
            ways = [option for option in there if option.checkpointing]
            cases = [(ranks, option) for option in ways for ranks in options.ranks]
            data["longest"] = [longest(*case, budget, options.tries) for case in cases]
            data["budget"] = budget
        if wanted("heads"):
            found = on_ranks(2, groups_of_heads, options.heads_tokens, options.rounds)
            data["heads"] = {
                "tokens": options.heads_tokens,
                "bytes": {groups: max(rank[groups][0] for rank in found) for groups in found[0]},
                "seconds": {groups: seconds for groups, (_, seconds) in found[0].items()},
            }
        if wanted("time") and KEEPS.is_there:
            data["time"] = times(options.time_tokens, options.rounds)
    data["projected"] = projected()
    return data


def write(options: argparse.Namespace, data: dict[str, Any]) -> int:
    """Write the page, the numbers and the picture, and return the status."""
    sections, off = [], []
    if "peaks" in data:
        off = [x for x in data["peaks"] if abs(x["bytes"] / x["counted"] - 1) > OFF]
        rows = [
            [
                x["ranks"],
                x["option"],
                f"{x['tokens']:,}",
                f"{x['bytes'] / MIB:.1f}",
                f"{x['counted'] / MIB:.1f}",
                f"{x['bytes'] / x['counted']:.3f}",
                x["phase"],
            ]
            for x in data["peaks"]
        ]
        headers = ["ranks", "options", "tokens", "MiB a rank", "counted", "ratio", "counted peak"]
        verdict = "All are" if not off else f"**{len(off)} of {len(data['peaks'])} are not**"
        sections.append(
            "## Peak of a step\n\nA Llama of 8 layers, width 128, MLPs of 448, 4 heads and 1 key head of 16, float32, "
            "AdamW, one row. Each option is added to those above it. Counted is by `parts_of`; the ratio is "
            f"measured / counted. {verdict} within {OFF:.0%}.\n\n"
            "![Peak memory of a rank against the length](memory.png)\n\n" + report.table(headers, rows)
        )
        options.output.mkdir(parents=True, exist_ok=True)
        plot(data["peaks"]).savefig(options.output / "memory.png", dpi=120)
    if "longest" in data:
        sections.append(longest_section(data))
    if "heads" in data:
        sections.append(heads_section(data["heads"]))
    if "time" in data:
        sections.append(time_section(data["time"]))
    if "gpu" in data:
        rows = [
            [name, f"{x['token'] / 2**10:.1f}", f"{x['fixed'] / 2**30:.1f}", f"{x['longest']:,}"]
            for name, x in data["gpu"].items()
        ]
        headers = ["options", "KiB a token", "GiB besides", "longest in 80 GB"]
        sections.append(
            "## Llama-3.1-8B with LoRA on one GPU, measured\n\nWith 2 and 4 of the 32 layers, bfloat16; the longest "
            "sequence of all layers is on the measured slopes.\n\n" + report.table(headers, rows)
        )
    if "aim" in data:
        sections.append(aim_section(data["aim"]))
    if "projected" in data:
        sections.append(projected_section(data["projected"]))
    text = "\n\n".join([counted_text(), *sections, report.described(data["machine"])])
    report.write(options.output, "memory", "Memory of a step, and the longest sequence", text, data)
    return 1 if off else 0


def counted_text() -> str:
    return (
        "Measured on the CPU is the resident memory of a process at its peak, above that before the model was made: "
        "weights, gradients, states, activations, buffers, messages. What libraries take once is there before. Blocks "
        "that are freed are returned at once."
    )


def longest_section(data: dict[str, Any]) -> str:
    alone = {x["option"]: x for x in data["longest"] if x["ranks"] == min(y["ranks"] for y in data["longest"])}
    work, rows = work_of(facts_of(LlamaConfig(**SIZES)), torch.float32), []

    def speed(x: dict[str, Any]) -> float:
        """Operations of the model a second and core."""
        return model_flops(work, x["tokens"]) / x["tokens"] * x["rate"] / min(x["ranks"], data["machine"]["cores"])

    for x in data["longest"]:
        one, cells = alone[x["option"]], [x["ranks"], x["option"], f"{x['tokens']:,}", f"{x['counted']:,}"]
        if x["tokens"] and one["tokens"]:
            cells.append(f"{x['tokens'] / one['tokens'] * one['ranks'] / x['ranks']:.3f}")
            cells += [f"{x['rate']:,.0f}", f"{speed(x) / 1e9:.1f}", f"{speed(x) / speed(one):.2f}"]
        rows.append(cells + ["-"] * (8 - len(cells)))
    headers = [
        "ranks",
        "options",
        "longest",
        "counted",
        "of N times one rank",
        "tokens/s",
        "GFLOP/s a core",
        "of one's",
    ]
    text = (
        f"## Longest sequence in {data['budget'] / MIB:.0f} MiB a rank\n\nThe aim is 0.95 of N times that of one "
        "rank. Part of the budget is divided by no length: weights, states of the optimizer, and objects of Python. "
        f"Rows of {2 * LONG:,} tokens and more leave no buffers of attention in memory between layers; others do "
        "on CPUs.\n\nMegatron-LM publishes 2 and 4 times the length at CP 2 and 4, at 0.92 and 0.78 of the FLOP/s "
        "(`plan --megatron-table`). The last column is ours: FLOP/s of the model for each core that computes. "
        "Attention that is computed again does not count."
    )
    return text + "\n\n" + report.table(headers, rows)


def heads_section(found: dict[str, Any]) -> str:
    rows = []
    for groups, seconds in found["seconds"].items():
        ratios = [this / one for this, one in zip(seconds, next(iter(found["seconds"].values())))]
        ratio, (low, high) = median(ratios), interval(ratios)
        size = found["bytes"][groups] / MIB
        rows.append([groups, f"{size:.1f}", f"{median(seconds):.3f}", f"{ratio:.3f} ({low:.3f} to {high:.3f})"])
    headers = ["groups", "MiB a rank", "s", "of one group's time"]
    text = (
        f"## Groups of heads\n\nAttention alone, forward and backward, {found['tokens']:,} tokens on 2 ranks, p2p, "
        f"{HEADS} heads of {HEAD_DIM} with a key head each, float32; the median of "
        f"{len(ratios)} rounds. Measured is what it adds to its queries, keys and values, with its results."
    )
    return text + "\n\n" + report.table(headers, rows)


def time_section(found: dict[str, Any]) -> str:
    seconds = found["seconds"]
    ratios = [kept / without for without, kept in zip(seconds[CHECKPOINTS.name], seconds[KEEPS.name])]
    ratio, (low, high) = median(ratios), interval(ratios)
    rows = [[name, f"{median(values):.3f}"] for name, values in seconds.items()]
    text = (
        f"## Step with kept attention\n\n2 layers, width 32, 4 heads of 32, {found['tokens']:,} tokens, one rank that "
        f"shards its batch, one thread; the median of {len(ratios)} rounds. Attention is {found['attention']:.1%} of "
        f"the floating-point operations of a forward pass. With kept attention a step takes **{ratio:.3f}** of one "
        f"without ({low:.3f} to {high:.3f}); the aim is at most 0.80."
    )
    return text + "\n\n" + report.table(["options", "s"], rows)


def aim_section(found: dict[str, Any]) -> str:
    whole = found["bytes"] + found["others"]
    return (
        f"## {found['tokens']:,} tokens on one GPU, measured\n\nOne step of {AIM_LAYERS} layers of the shape of "
        f"Llama-3.1-8B with LoRA, bfloat16, options: tiles of 4,096 tokens, checkpoints and kept attention on the "
        f"host; a window of {AIM_WINDOW:,} tokens, which changes no size of a buffer. PyTorch was given "
        f"{AIM_BYTES / GB:.0f} GB, and took {found['taken'] / GB:.1f}. At the peak **{found['bytes'] / GB:.1f} GB** "
        f"were allocated ({found['counted'] / GB:.1f} counted). The other "
        f"{LLAMA['num_hidden_layers'] - AIM_LAYERS} layers would add their weights, {found['others'] / GB:.1f} GB: "
        f"{whole / GB:.1f} GB in all."
    )


def projected_section(found: list[dict[str, Any]]) -> str:
    rows = [
        [
            x["option"],
            f"{x['tokens']:,}",
            x["phase"],
            ", ".join(f"{part} {value:.1f}" for part, value in x["gib"].items() if value >= 0.05),
            f"{x['host']:.1f}",
            *(
                ", ".join(f"{tokens / int(ranks) / x['tokens']:.2f}" for ranks, tokens in x[way].items())
                for way in ("one group", "groups")
            ),
        ]
        for x in found
    ]
    headers = ["options", "longest", "peak", "GiB by part", "GiB of the host", "one group", "groups of heads"]
    return (
        "## Llama-3.1-8B with LoRA on one GPU of 80 GB, **projected**\n\nNot measured: counted by `parts_of` in "
        f"bfloat16, adapters of rank {LORA_RANK}, AdamW. The aim is {AIM_TOKENS:,} tokens. The last columns are "
        "the longest sequences of rings (p2p) of 2, 4 and 8 GPUs, over as many times that of one, with all heads of a "
        "layer in one group, and in groups.\n\n" + report.table(headers, rows)
    )


def plot(found: list[dict[str, Any]]) -> Figure:
    """Draw peaks against lengths: a panel for each number of ranks, a line for each option, counts dashed."""
    ranks = sorted({x["ranks"] for x in found})
    figure = Figure(figsize=(4 * len(ranks), 3.6), layout="constrained")
    panels = figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0]
    for panel, number in zip(panels, ranks):
        for place, name in enumerate(dict.fromkeys(x["option"] for x in found)):
            line = [x for x in found if (x["ranks"], x["option"]) == (number, name)]
            tokens = [x["tokens"] for x in line]
            panel.plot(tokens, [x["bytes"] / MIB for x in line], "o-", color=f"C{place}", label=name)
            panel.plot(tokens, [x["counted"] / MIB for x in line], "--", color=f"C{place}")
        panel.set(title=f"{number} rank{'s' * (number > 1)}", xlabel="tokens of the sequence", xscale="log")
        panel.set_xticks(tokens, [f"{x:,}" for x in tokens])
        panel.minorticks_off()
    panels[0].set(ylabel="peak MiB of a rank", yscale="log")
    panels[0].legend(fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(main())
