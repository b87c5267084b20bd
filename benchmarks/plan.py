"""Estimates, from counts alone, of the traffic, balance and speed of each way of context parallelism.

    python -m benchmarks.plan --ranks 2,8,32,128,1024 --tokens 8K,128K,1M,8M

A layer of Llama-3-8B's attention (32 heads, 8 key heads of 128, bfloat16), causal, forward and backward, on the nodes
of `hf_context_parallel.planning.machine.H100_NODE`. Efficiency is the time of the arithmetic alone, divided equally,
over the time of the slowest rank.

    p2p, all_gather, a2a, a2a+p2p, auto     ours, zigzag over the whole row; a2a+p2p in the best subgroups
    balanced, auto          ours, tokens dealt by `hf_context_parallel.planning.balanced`
    zigzag by document      each document cut into 2 chunks a rank, padded to a multiple of that; an untrimmed ring,
                            gradients once round (ring-flash-attn's zigzag varlen, Transformer Engine's p2p)
    llama3                  a rank's tokens are neighbours; all keys are gathered, their gradients reduced
                            (ring-flash-attn)
    Ulysses                 heads dealt equally, all tokens exchanged, keys replicated where they have fewer heads

For peers the assumptions are favourable. Their kernels are as fast on short pieces as on long ones, with one call a
step. They have one fused exchange of heads. Computing hides their messages as fully as ours. Their collectives use all
links of a node at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from tqdm import tqdm

from hf_context_parallel.attention.auto_strategy import (
    Share,
    Traffic,
    candidates,
    counts_of,
    exchange_of_heads,
    ring_of_keys,
    shares,
)
from hf_context_parallel.attention.strategy import Shape
from hf_context_parallel.config import ContextParallelConfig
from hf_context_parallel.planning.balanced import make_layout
from hf_context_parallel.planning.layout import Layout, contiguous, zigzag
from hf_context_parallel.planning.machine import H100_NODE, attention_flops
from hf_context_parallel.planning.mask import Mask, Pattern
from hf_context_parallel.planning.workload import workload

from . import report
from .traffic import long_tailed_documents

SHAPE = Shape(heads=32, key_heads=8, query_dim=128, value_dim=128, dtype=torch.bfloat16)
MACHINE = H100_NODE
WINDOW = 4096
LEAST = 256
"""Fewest tokens of a rank. With fewer, a sequence would not be split over so many ranks."""


class Batch(NamedTuple):
    """Lengths of the documents in the order of the row, and a window."""

    documents: list[int]
    window: int | None = None

    def mask(self) -> Mask:
        edges = np.cumsum([0, *self.documents]).tolist()
        row = tuple(((start, stop),) for start, stop in zip(edges, edges[1:]) if start < stop)
        return Mask(edges[-1], (row,), Pattern(sliding_window=self.window))


def _four(length: int) -> list[int]:
    """Lengths of four documents: 40, 30, 20 and 10 hundredths of the row."""
    return np.diff(np.rint(np.array([0, 0.4, 0.7, 0.9, 1]) * length).astype(int)).tolist()


def _many(length: int) -> list[int]:
    """Lengths of 400 short documents, log-normal with sigma 0.5."""
    ends = np.random.default_rng(0).lognormal(sigma=0.5, size=400).cumsum()
    return np.diff(np.rint(ends / ends[-1] * length).astype(int), prepend=0).tolist()


BATCHES: dict[str, Callable[[int], Batch]] = {
    "one document": lambda length: Batch([length]),
    "four documents": lambda length: Batch(_four(length)),
    "64 long-tailed documents": lambda length: Batch(long_tailed_documents(length)),
    "400 short documents": lambda length: Batch(_many(length)),
    f"a window of {WINDOW:,}": lambda length: Batch([length], WINDOW),
}


class Result(NamedTuple):
    """Result of one way to compute a batch.

    Args:
        efficiency: time of the arithmetic alone, divided equally, over the time of the slowest rank.
        work: pairs of the busiest rank over the mean pairs of the batch.
        megabytes: megabytes that a rank sends for a layer on average, forward and backward.
        how: the strategy, if it was chosen.
    """

    efficiency: float
    work: float
    megabytes: float
    how: str = ""


def ours(batch: Batch, layout: Layout) -> dict[str, list[Share]]:
    """Work and traffic of each rank, by each strategy."""
    mask = batch.mask()
    counts = counts_of(layout, mask)
    found = {}
    for comm_type, inner in candidates(ContextParallelConfig(size=layout.size), SHAPE):
        name = f"a2a+p2p of {inner}" if comm_type == "a2a+p2p" else comm_type
        found[name] = shares(comm_type, inner, layout, counts, SHAPE, MACHINE)
    return found


def zigzag_by_document(batch: Batch, size: int) -> list[Share] | None:
    """Work and traffic of a zigzag ring by document. Such rings refuse windows."""
    if batch.window is not None:
        return None
    padded = [-(-length // (2 * size)) * 2 * size for length in batch.documents]
    tokens = sum(padded) // size
    work = sum(length * (length + 1) // 2 for length in padded) // size * SHAPE.heads
    keys, gradients = tokens * (size - 1), tokens * size
    # All queries of a rank are merged for keys of an earlier rank, and half of them for keys of a later rank.
    rows = (rank * tokens + (size - 1 - rank) * tokens // 2 for rank in range(size))
    return [ring_of_keys(work, size, keys, gradients, merged, SHAPE, size > MACHINE.node) for merged in rows]


def llama3(batch: Batch, size: int) -> list[Share]:
    """Work and traffic of the all-gather of Llama 3. Gradients are reduced in the dtype of the keys."""
    mask = batch.mask()
    own = mask.length / size * SHAPE.key_value_numbers * SHAPE.dtype.itemsize
    sent = 3 * own * (size - 1)
    far = sent / MACHINE.node if size > MACHINE.node else 0.0
    traffic = Traffic(sent - far, far, 3 * (size - 1))
    # The rank copies its own keys to the others in both passes, as in our all_gather.
    pairs = workload(contiguous(mask.length, size), mask).pairs
    return [Share(computed * SHAPE.heads, 1, 4 * own, traffic) for computed in pairs]


def ulysses(batch: Batch, size: int) -> list[Share] | None:
    """Work and traffic of Ulysses, for which the ranks must divide the heads."""
    if SHAPE.heads % size:
        return None
    mask = batch.mask()
    work = sum(workload(contiguous(mask.length, 1), mask).pairs) * SHAPE.heads // size
    counts = [mask.length // size] * size
    found = []
    for rank in range(size):
        _, copied, traffic = exchange_of_heads(rank, counts, SHAPE, MACHINE)
        found.append(Share(work, 1, copied, shown=traffic))
    return found


def judged(found: list[Share], pairs: int, how: str = "") -> Result:
    """Result of the shares of all ranks, for a batch of `pairs` pairs."""
    mean = pairs * SHAPE.heads / len(found)
    ideal = MACHINE.attention(attention_flops(mean, 1, SHAPE.query_dim, SHAPE.value_dim))
    slowest = max(share.seconds(SHAPE, MACHINE).total for share in found)
    sent = sum(share.bytes for share in found) / len(found)
    return Result(ideal / slowest, max(share.work for share in found) / mean, sent / 1e6, how)


def count(batch: Batch, size: int) -> dict[str, Result | None]:
    """Result of each way, or None if it does not support the batch or the number of ranks."""
    mask = batch.mask()
    pairs = sum(workload(contiguous(mask.length, 1), mask).pairs)
    by_zigzag = {name: judged(found, pairs, name) for name, found in ours(batch, zigzag(mask.length, size)).items()}
    hierarchical = [result for name, result in by_zigzag.items() if name.startswith("a2a+p2p")]
    results = {name: by_zigzag.get(name) for name in ("p2p", "all_gather", "a2a")}
    results["a2a+p2p"] = max(hierarchical, default=None)
    results["auto"] = max(by_zigzag.values())
    layout = make_layout("balanced", mask.length, size, mask.rows[0])
    results["balanced, auto"] = max(judged(found, pairs, name) for name, found in ours(batch, layout).items())
    peers = {"zigzag by document": zigzag_by_document, "llama3": llama3, "Ulysses": ulysses}
    for name, peer in peers.items():
        found = peer(batch, size)
        results[name] = None if found is None else judged(found, pairs)
    return results


Results = dict[str, dict[int, dict[int, dict[str, Result | None]]]]
"""Results by batch, tokens, ranks and way."""


def plot(results: Results) -> Figure:
    """Draw efficiency by ranks, with a column for each batch and a row for each length. Peers are dashed."""
    lengths = list(next(iter(results.values())))
    figure = Figure(figsize=(3.2 * len(results), 2.4 * len(lengths)), layout="constrained")
    axes = figure.subplots(len(lengths), len(results), sharex=True, sharey=True, squeeze=False)
    for column, (name, by_tokens) in enumerate(results.items()):
        axes[0, column].set_title(name)
        axes[-1, column].set_xlabel("ranks")
        for row, (tokens, by_ranks) in enumerate(by_tokens.items()):
            axis = axes[row, column]
            axes[row, 0].set_ylabel(f"{_short(tokens)} tokens\nefficiency")
            for number, way in enumerate(next(iter(by_ranks.values()), {})):
                peer = way in ("zigzag by document", "llama3", "Ulysses")
                points = [(ranks, ways[way].efficiency) for ranks, ways in by_ranks.items() if ways[way]]
                style = {"color": f"C{number}", "linestyle": "--" if peer else "-", "marker": "."}
                axis.plot(
                    *zip(*points) if points else ((), ()), label=way, **style, lw=2.5 if way.endswith("auto") else 1
                )
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.set_ylim(0, 1.02)
            axis.grid(alpha=0.3)
    handles, labels = axes[-1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _short(tokens: int) -> str:
    """Format 131072 as 128K."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


def _tokens(text: str) -> int:
    """Parse 128K as 131072."""
    units = {"K": 1 << 10, "M": 1 << 20}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def sections(results: Results) -> list[str]:
    """Sections of the page: for each batch a table of efficiencies, and one of work and bytes."""
    found = []
    for name, by_tokens in results.items():
        cases = [(tokens, ranks, ways) for tokens, by_ranks in by_tokens.items() for ranks, ways in by_ranks.items()]
        headers = ["tokens", "ranks", *cases[0][2]]
        efficiency = [
            (_short(tokens), str(ranks), *(f"{way.efficiency:.2f}" if way else "-" for way in ways.values()))
            for tokens, ranks, ways in cases
        ]
        chosen = [(ways["auto"].how, ways["balanced, auto"].how) for _, _, ways in cases]
        shared = [
            (
                _short(tokens),
                str(ranks),
                *(f"{way.work:.2f}, {_rounded(way.megabytes)}" if way else "-" for way in ways.values()),
            )
            for tokens, ranks, ways in cases
        ]
        found.append(
            f"## {name[0].upper()}{name[1:]}\n\nEfficiency, and what auto chose:\n\n"
            + report.table(
                [*headers, "auto is", "balanced, it is"], [(*row, *how) for row, how in zip(efficiency, chosen)]
            )
            + "\n\nThe largest rank's work over the mean, and megabytes that a rank sends:\n\n"
            + report.table(headers, shared)
        )
    return found


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=report.comma_separated(int), default=[2, 8, 32, 128, 1024])
    lengths = [1 << 13, 1 << 17, 1 << 20, 1 << 23]
    parser.add_argument("--tokens", type=report.comma_separated(_tokens), default=lengths, help="of the whole row")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for plan.md, .png and .json")
    options = parser.parse_args(arguments)

    results: Results = {name: {tokens: {} for tokens in options.tokens} for name in BATCHES}
    cases = [(tokens, ranks) for tokens in options.tokens for ranks in options.ranks if tokens >= LEAST * ranks]
    for tokens, ranks in tqdm(cases, unit="size"):
        for name, make in BATCHES.items():
            results[name][tokens][ranks] = count(make(tokens), ranks)

    about = (
        f"A causal layer of {SHAPE.heads} heads and {SHAPE.key_heads} key heads of {SHAPE.query_dim}, bfloat16, "
        f"forward and backward, projected for H100 nodes of {MACHINE.node} ranks with FlashAttention-2 from counts of "
        "work and messages; no time is measured here. Efficiency is the time of the arithmetic alone, shared "
        f"perfectly, over that of the slowest rank. Sizes that leave a rank fewer than {LEAST} tokens are left out, "
        "and `-` is what a way does not take: a window in a ring by document, more ranks than heads.\n\n"
        "![Efficiency by ranks; peers dashed](plan.png)"
    )
    page = "\n\n".join([about, *sections(results)])
    data = {
        name: {
            tokens: {ranks: {way: r and r._asdict() for way, r in ways.items()} for ranks, ways in by_ranks.items()}
            for tokens, by_ranks in by_tokens.items()
        }
        for name, by_tokens in results.items()
    }
    report.write(options.output, "plan", "What ways of context parallelism could reach", page, {"results": data})
    plot(results).savefig(options.output / "plan.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
