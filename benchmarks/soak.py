"""Soak: thousands of random steps on four CPU ranks, each compared with one process, while resources stay flat.

    python -m benchmarks.soak

The steps come in stretches. Each stretch makes a `ContextParallel` with settings of its own (strategy, layout, kernel)
and closes it at its end. Each step of it has a random size of the groups and a random kind of batch, or the scheduler
of dynamic CP deals the samples of two batches. The model has a layer of full attention and one with a window.

One process computes the same batches with the stock model and *the same weights*: the two share them. So each step is
compared for itself. Documents of packed rows are computed one by one. After the step, plain SGD changes the weights.

**Flat** are memory, file descriptors, threads and process groups: at the end of stretches, a rank has no more
descriptors, threads and groups than after the first tenth of the run, and its memory has not grown by more than
`GROWTH`.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import hf_context_parallel as hcp
from hf_context_parallel.distributed.worker_pool import WorkerPool
from hf_context_parallel.dynamic.scheduler import Round, Scheduler

from . import report

RANKS = 4
STRETCH = 20
"""Steps with the same settings."""
LONGEST = 96
"""Most tokens of a row."""
LOSS = 1e-6
"""Allowed difference of a loss, of the loss. Float32 has steps of 1e-7."""
GRADIENT = 1e-5
"""Allowed difference of gradients: the norm of the difference, of the norm of the gradient."""
GROWTH = 24
"""MiB that the memory of a rank may grow after the first tenth of the run."""
WARM = 0.1
"""Share of the steps that fill caches, before resources are counted."""
LEARNING_RATE = 0.05
TIMEOUT = 7200
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 128, "max_position_embeddings": 512}
LAYERS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 12, "use_sliding_window": True}
COMM_TYPES = ("auto", "p2p", "all_gather", "a2a", "a2a+p2p", ("p2p", "a2a"))
LAYOUTS = ("auto", "zigzag", "contiguous", "balanced")
KINDS = ("padded", "packed", "cu_seq_lens", "one document")


class Step(NamedTuple):
    """A step that was compared.

    Args:
        comm_type, layout, kind, size: what it ran with. The size is 0 for groups of dynamic sizes.
        loss, gradient: the relative differences from one process.
    """

    comm_type: str
    layout: str
    kind: str
    size: int
    loss: float
    gradient: float


class Resources(NamedTuple):
    """Resources that a rank holds. Memory is in MiB."""

    step: int
    memory: float
    descriptors: int
    threads: int
    groups: int


def resources(step: int) -> Resources:
    gc.collect()
    process = psutil.Process()
    groups = len(dist.distributed_c10d._world.pg_map)
    return Resources(step, process.memory_info().rss / 2**20, process.num_fds(), process.num_threads(), groups)


def make_models() -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
    """Make the model for shards and the stock model, which has the same weights in the same memory."""
    torch.manual_seed(0)
    model, stock = (
        Qwen3ForCausalLM._from_config(Qwen3Config(**SIZES, **LAYERS), attn_implementation=attention).train()
        for attention in ("context_parallel", "sdpa")
    )
    for theirs, ours in zip(stock.parameters(), model.parameters(), strict=True):
        theirs.data = ours.data
    return model, stock


def settings_of(draw: random.Random, dynamic: bool) -> dict[str, Any]:
    comm_type = draw.choice(COMM_TYPES)
    found = {
        "size": RANKS,
        "comm_type": comm_type if isinstance(comm_type, str) else list(comm_type),
        "layout": draw.choice(LAYOUTS),
        "kernel": draw.choice(("auto", "cpu", "reference")),
    }
    return found | ({"dynamic": True, "max_tokens_per_rank": LONGEST} if dynamic else {})


def documents_of(draw: random.Random) -> list[int]:
    """Draw lengths of documents that share a row; some have one token."""
    lengths = [draw.choice((1, 2, 3, draw.randint(1, LONGEST // 2))) for _ in range(draw.randint(1, 8))]
    while sum(lengths) > LONGEST:
        lengths.pop()
    return lengths or [LONGEST]


def batch_of(
    draw: random.Random, kind: str, dynamic: bool
) -> tuple[dict[str, torch.Tensor], list[tuple[int, int, int]]]:
    """Draw a batch. With dynamic sizes it is padded on the right only, as these need it.

    Returns:
        The batch, and the row, start and stop of each document in it.
    """
    if kind == "padded":
        lengths = [draw.randint(2, LONGEST) for _ in range(draw.randint(1, 3))]
        width = max(lengths)
        left = not dynamic and draw.random() < 0.5
        spans = [(row, width - n if left else 0, width if left else n) for row, n in enumerate(lengths)]
        rows = len(lengths)
    elif kind == "one document":
        rows, width = 1, draw.randint(2, LONGEST)
        spans = [(0, 0, width)]
    else:
        lengths = documents_of(draw)
        rows, width = 1, sum(lengths)
        edges = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        spans = [(0, start, stop) for start, stop in zip(edges, edges[1:])]
    seeded = torch.Generator().manual_seed(draw.randrange(2**31))
    ids = torch.randint(1, SIZES["vocab_size"], (rows, width), generator=seeded)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    positions = torch.zeros_like(ids)
    for row, start, stop in spans:
        mask[row, start:stop] = 1
        learnt = torch.rand(stop - start, generator=seeded) < draw.choice((1.0, 0.5))
        labels[row, start + 1 : stop] = ids[row, start + 1 : stop].where(learnt[1:], torch.tensor(-100))
        positions[row, start:stop] = torch.arange(stop - start)
    if not (labels >= 0).any():  # the mean over no target is NaN on one process
        return batch_of(draw, kind, dynamic)
    batch = {"input_ids": ids, "labels": labels}
    if kind == "padded":
        batch["attention_mask"] = mask
    elif kind == "packed":
        batch["position_ids"] = positions
    elif kind == "cu_seq_lens":
        edges = torch.tensor([0, *(stop for _, _, stop in spans)], dtype=torch.int32)
        batch |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "position_ids": positions}
    return batch, spans


def reference(stock: torch.nn.Module, batch: dict, spans: list[tuple[int, int, int]], targets: int) -> torch.Tensor:
    """Compute the sum of the losses of the documents, each alone, over `targets`."""
    loss = torch.zeros(())
    for row, start, stop in spans:
        labels = batch["labels"][row : row + 1, start:stop]
        if (labels >= 0).any():
            ids = batch["input_ids"][row : row + 1, start:stop]
            loss = loss + stock(input_ids=ids, labels=labels, num_items_in_batch=targets, use_cache=False).loss
    return loss


def take_step(
    cp: hcp.ContextParallel, models: tuple, draw: random.Random, kind: str, scheduler: Scheduler | None
) -> tuple[float, float]:
    """Take a step on all ranks, and compare it.

    Every rank draws alike. With groups smaller than the world, each has a batch of its own.

    Returns:
        The relative differences of the loss and of the gradient.
    """
    model, stock = models
    groups = 1 if scheduler is not None else dist.get_world_size() // cp.size
    drawn = [batch_of(draw, kind, scheduler is not None) for _ in range(groups if scheduler is None else 2)]
    targets = sum(int((batch["labels"] >= 0).sum()) for batch, _ in drawn)
    own = [number for number in range(len(drawn)) if number % dist.get_world_size() == dist.get_rank()]
    expected = torch.zeros(())
    for number in own:  # one rank for each batch
        loss = reference(stock, *drawn[number], targets)
        loss.backward()
        expected += loss.detach()
    found = torch.zeros(())
    rounds = [Round(cp.size, drawn[cp.groups.data_rank % groups][0], 0, 0)]
    if scheduler is not None:
        rounds = scheduler.rounds([batch for batch, _ in drawn])
    for one in rounds:
        cp.switch(one.size)
        loss = model(**one.batch, num_items_in_batch=targets, use_cache=False).loss / one.size
        loss.backward()
        found += loss.detach()
    cp.switch(cp.made_with.size)
    totals = torch.stack([found, expected])
    dist.all_reduce(totals)
    pairs = [(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True)]
    both = torch.stack([flat([a for a, _ in pairs]), flat([b for _, b in pairs])])
    dist.all_reduce(both)
    update(pairs, both[0])
    return abs(float(totals[0] / totals[1] - 1)), float((both[0] - both[1]).norm() / both[1].norm())


def flat(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Flatten the gradients of parameters to one vector, with 0 where there is none."""
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])


def update(pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]], gradient: torch.Tensor) -> None:
    """Change the weights by a step of SGD, which all ranks take alike, and drop all gradients."""
    with torch.no_grad():
        for (ours, theirs), part in zip(pairs, gradient.split([a.numel() for a, _ in pairs])):
            ours -= LEARNING_RATE * part.view_as(ours)
            ours.grad = theirs.grad = None


def stretches(steps: int, draw: random.Random) -> Iterator[tuple[int, bool]]:
    """Yield the steps of each stretch, and whether its sizes are dynamic: about every fourth."""
    left = steps
    while left:
        taken = min(STRETCH, left)
        yield taken, draw.random() < 0.25
        left -= taken


def soak(steps: int, seed: int) -> tuple[list[Step], list[Resources]]:
    """Run on a rank. All ranks draw the same numbers.

    Returns:
        The steps, and the resources of this rank at the end of each stretch.
    """
    draw = random.Random(seed)
    models = make_models()
    done: list[Step] = []
    held: list[Resources] = []
    progress = tqdm(total=steps, unit="step", disable=dist.get_rank() > 0, mininterval=5)
    for taken, dynamic in stretches(steps, draw):
        settings = settings_of(draw, dynamic)
        with hcp.ContextParallel(hcp.ContextParallelConfig(**settings)) as cp:
            hcp.parallelize(models[0], cp)
            scheduler = Scheduler(cp, models[0]) if dynamic else None
            for _ in range(taken):
                kind = draw.choice(KINDS)
                size = RANKS if dynamic else draw.choice((1, 2, 4))
                with cp.using(size):
                    differences = take_step(cp, models, draw, kind, scheduler)
                name = settings["comm_type"] if isinstance(settings["comm_type"], str) else "one for each layer"
                done.append(Step(name, settings["layout"], kind, 0 if dynamic else size, *differences))
                progress.update()
        del cp, scheduler
        held.append(resources(len(done)))
    return done, held


def faults(done: list[Step], held: list[list[Resources]]) -> list[str]:
    """List what is not as it should be.

    Args:
        done: the steps.
        held: the resources of each rank at the end of each stretch.
    """
    found = [f"{step}" for step in done if not (step.loss <= LOSS and step.gradient <= GRADIENT)]
    for rank, marks in enumerate(held):
        first = marks[math.ceil(WARM * len(marks)) - 1]
        for mark in marks[marks.index(first) :]:
            grown = [
                name for name in ("descriptors", "threads", "groups") if getattr(mark, name) > getattr(first, name)
            ]
            grown += ["memory"] if mark.memory > first.memory + GROWTH else []
            if grown:
                found.append(f"rank {rank} has more {', '.join(grown)}: {mark}, and {first} before")
                break
    return found


def page(done: list[Step], held: list[list[Resources]], wrong: list[str], seed: int) -> str:
    """Write the page of a run."""

    def rows(key) -> list[list[Any]]:
        names = sorted({key(step) for step in done}, key=str)
        chosen = [[step for step in done if key(step) == name] for name in names]
        return [
            [f"{name}", len(steps), f"{max(s.loss for s in steps):.1e}", f"{max(s.gradient for s in steps):.1e}"]
            for name, steps in zip(names, chosen)
        ]

    parts = [
        f"{len(done):,} steps on {RANKS} CPU ranks, float32, seed {seed}: the largest difference from one process "
        f"with the same weights, of the loss (allowed {LOSS:g}) and of the gradient (its norm, of the gradient's; "
        f"allowed {GRADIENT:g}), each relative.",
    ]
    for heading, key in (
        ("strategy", lambda step: step.comm_type),
        ("layout", lambda step: step.layout),
        ("batch", lambda step: step.kind),
        ("ranks of a group", lambda step: step.size or "dynamic"),
    ):
        parts.append(report.table([heading, "steps", "loss", "gradient"], rows(key)))
    marks = [held[0][math.ceil(share * len(held[0])) - 1] for share in (WARM, 0.25, 0.5, 0.75, 1)]
    table = [[f"{m.step:,}", f"{m.memory:,.0f}", str(m.descriptors), str(m.threads), str(m.groups)] for m in marks]
    parts += [
        "What rank 0 held, each time after a `ContextParallel` was closed:",
        report.table(["after step", "memory (MiB)", "descriptors", "threads", "process groups"], table),
        "All is as it should be." if not wrong else "**Faults**\n\n" + "\n".join(f"- {fault}" for fault in wrong[:20]),
    ]
    return "\n\n".join(parts)


def lines(rows: Sequence[NamedTuple]) -> list[str]:
    """Write rows as lines of comma-separated values, with their names in the first."""
    return [
        ",".join(rows[0]._fields),
        *(",".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) for row in rows),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    pool = WorkerPool(RANKS, TIMEOUT)
    try:
        answers = pool(RANKS, soak, options.steps, options.seed)
    finally:
        pool.close()
    done, held = answers[0][0], [marks for _, marks in answers]
    wrong = faults(done, held)
    facts = report.machine()
    text = f"{page(done, held, wrong, options.seed)}\n\n{report.described(facts)}"
    data = {"machine": facts, "faults": wrong, "steps": lines(done), "held": [lines(marks) for marks in held]}
    report.write(options.output, "soak", "Soak", text, data)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
