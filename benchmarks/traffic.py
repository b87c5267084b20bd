"""Counts of the tokens that travel for one layer, by the way of sending them. No process is started.

    python -m benchmarks.traffic --ranks 2,3,4,8,16,32,64

Counts are of tokens whose keys/values travel in a forward pass, and of tokens whose key/value gradients travel in a
backward pass. Gradients are float32, with twice the bytes of bfloat16 keys. The layout is zigzag, the mask causal.
Counts are multiples of the need: a token is needed once by each rank that reads it and does not hold it. Inter-node
traffic crosses nodes of 8 ranks.

    untrimmed ring      from rank r to r - 1, all keys all the way; gradients once around, as in usual rings
    trimmed ring        from rank r to r - 1, a token dropped when no further rank reads it; gradients one step
                        behind, and back to the owner from the last reader
    owner to readers    straight to each reader, and gradients straight back from each reader
    ours                the plans of `hf_context_parallel.planning.plan`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from tqdm import tqdm

from hf_context_parallel.planning.layout import Layout, zigzag
from hf_context_parallel.planning.mask import Mask
from hf_context_parallel.planning.plan import build_plan

from . import report

NODE = 8  # ranks


class Traffic(NamedTuple):
    """Tokens that travel, of keys and of gradients, in all and between nodes."""

    keys: int
    gradients: int
    keys_between: int
    gradients_between: int


def one_document(length: int) -> list[int]:
    return [length]


def equal_documents(length: int) -> list[int]:
    """Lengths of 10 documents, whose edges are not edges of chunks (8 chunks at 4 ranks)."""
    return np.diff(np.rint(np.linspace(0, length, 11)).astype(int)).tolist()


def long_tailed_documents(length: int) -> list[int]:
    """Lengths of 64 documents, log-normal with sigma 1.5."""
    shares = np.random.default_rng(0).lognormal(sigma=1.5, size=64).cumsum()
    return np.diff(np.rint(shares / shares[-1] * length).astype(int), prepend=0).tolist()


CORPORA = {
    "one document": one_document,
    "10 equal documents": equal_documents,
    "64 long-tailed documents": long_tailed_documents,
}


class Reads:
    """Readers of each token, found without a plan.

    `readers[d, t]` is True if the rank that is d before the owner of token t reads it, for d from 0 to size - 1.
    """

    def __init__(self, layout: Layout, documents: list[int]):
        self.size = layout.size
        document = np.repeat(np.arange(len(documents)), documents)
        last = np.full((layout.size, len(documents)), -1)  # the last position of each document that a rank holds
        self.owner = np.empty(layout.length, dtype=int)
        for rank in range(layout.size):
            positions = layout.positions(rank).numpy()
            self.owner[positions] = rank
            np.maximum.at(last[rank], document[positions], positions)
        positions = np.arange(layout.length)
        ranks = (self.owner - np.arange(layout.size)[:, None]) % layout.size
        self.readers = last[ranks, document] > positions

    def need(self) -> int:
        """Count each token once for every reader that does not hold it."""
        return int(self.readers[1:].sum())

    def untrimmed_ring(self) -> Traffic:
        return self._ring(np.full(len(self.owner), self.size - 1), round_trip=True)

    def trimmed_ring(self) -> Traffic:
        distances = np.arange(self.size)[:, None]
        return self._ring((self.readers * distances).max(0), round_trip=False)

    def owner_to_readers(self) -> Traffic:
        between = sum(
            int((self.readers[d] & self._between(self.owner, self.owner - d)).sum()) for d in range(1, self.size)
        )
        return Traffic(self.need(), self.need(), between, between)

    def _ring(self, hops: np.ndarray, round_trip: bool) -> Traffic:
        """Traffic of tokens that travel `hops` ranks down the ring.

        Gradients start at the owner (`round_trip`) or at the first reader, and end at the owner.
        """
        crossings = np.zeros(len(hops), dtype=int)
        first = self._between(self.owner, self.owner - 1) & (hops > 0)
        for hop in range(self.size - 1):
            crossings += self._between(self.owner - hop, self.owner - hop - 1) & (hop < hops)
        home = self._between(self.owner - hops, self.owner) & (hops > 0)
        gradients = hops + round_trip
        gradients_between = crossings + home - (0 if round_trip else first)
        return Traffic(*(int(tokens.sum()) for tokens in (hops, gradients, crossings, gradients_between)))

    def _between(self, sender: np.ndarray, receiver: np.ndarray) -> np.ndarray:
        """Return True if two ranks, taken modulo the size, are on different nodes."""
        return sender % self.size // NODE != receiver % self.size // NODE


def planned(layout: Layout, documents: list[int]) -> Traffic:
    """Traffic of the plans of all ranks."""
    edges = np.cumsum([0, *documents]).tolist()
    row = tuple(((start, stop),) for start, stop in zip(edges, edges[1:]) if start < stop)
    counts = np.zeros((2, 2), dtype=int)
    for rank in range(layout.size):
        for step in build_plan(layout, Mask(layout.length, (row,)), rank).steps:
            for kind, transfers in enumerate(((*step.forwards, *step.direct_sends), step.grad_sends)):
                for transfer in transfers:
                    counts[:, kind] += transfer.tokens * np.array([1, transfer.peer // NODE != rank // NODE])
    return Traffic(*counts.flatten().tolist())


def count(layout: Layout, documents: list[int]) -> dict[str, dict[str, float]]:
    """Count the traffic of each way of sending, in multiples of the need."""
    reads = Reads(layout, documents)
    ways = {
        "untrimmed ring": reads.untrimmed_ring(),
        "trimmed ring": reads.trimmed_ring(),
        "owner to readers": reads.owner_to_readers(),
        "ours": planned(layout, documents),
    }
    return {
        way: {kind: tokens / reads.need() for kind, tokens in traffic._asdict().items()}
        for way, traffic in ways.items()
    }


def plot(results: dict[str, dict[int, dict[str, dict[str, float]]]]) -> Figure:
    """Draw a column for each corpus: all traffic above, traffic between nodes below, gradients dotted."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(results), sharex=True, squeeze=False)
    for column, (corpus, by_ranks) in enumerate(results.items()):
        axes[0, column].set_title(corpus)
        for row, (keys, gradients) in enumerate((("keys", "gradients"), ("keys_between", "gradients_between"))):
            axis = axes[row, column]
            for number, way in enumerate(next(iter(by_ranks.values()))):
                for kind, style in ((keys, "-"), (gradients, ":")):
                    values = [ways[way][kind] for ways in by_ranks.values()]
                    label = way if kind == keys else None
                    axis.plot(list(by_ranks), values, f"C{number}{style}", marker=".", label=label)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel("ranks")
    axes[0, 0].set_ylabel("tokens that travel / need")
    axes[1, 0].set_ylabel("tokens between nodes / need")
    axes[0, 0].legend()
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=report.comma_separated(int), default=[2, 3, 4, 8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a rank")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder for traffic.md, .png and .json")
    options = parser.parse_args(arguments)

    results: dict[str, dict[int, dict[str, dict[str, float]]]] = {corpus: {} for corpus in CORPORA}
    for ranks in tqdm(options.ranks, unit="size"):
        layout = zigzag(ranks * options.tokens, ranks)
        for corpus, documents in CORPORA.items():
            results[corpus][ranks] = count(layout, documents(layout.length))

    sections = []
    for corpus, by_ranks in results.items():
        rows = [
            (str(ranks), way, *(f"{value:.2f}" for value in kinds.values()))
            for ranks, ways in by_ranks.items()
            for way, kinds in ways.items()
        ]
        headers = ["ranks", "way", "keys", "gradients", "keys between nodes", "gradients between nodes"]
        sections.append(f"## {corpus.capitalize()}\n\n{report.table(headers, rows)}")
    about = (
        f"Zigzag, causal, {options.tokens:,} tokens a rank, nodes of {NODE} ranks. Tokens whose keys and values, or "
        "their gradients, travel for one layer, as multiples of the need: each token once for every rank that reads "
        "it and does not hold it. Gradients are in float32, twice the bytes of bfloat16 keys.\n\n"
        "![Traffic by way of sending; gradients dotted](traffic.png)"
    )
    title = "What travels, by the way it is sent"
    report.write(options.output, "traffic", title, "\n\n".join([about, *sections]), {"results": results})
    plot(results).savefig(options.output / "traffic.png", dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
