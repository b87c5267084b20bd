"""Benchmark of what a worker of the loader makes ahead of a step, and of what the rank has left to do.

    python -m benchmarks.ahead

One process plays one of 8 ranks. It packs random documents into a row, takes a shard, and plans two kinds of layers:
full attention and a window. Times are those of one thread on its core.
"""

from __future__ import annotations

import argparse
import pickle
import random
import sys
import time
from pathlib import Path
from statistics import median

import torch

from hf_context_parallel import ContextParallelConfig
from hf_context_parallel.attention.planner import Layer, Planner
from hf_context_parallel.attention.strategy import Shape
from hf_context_parallel.calibration.rates import machines
from hf_context_parallel.data.batch import SHARD
from hf_context_parallel.data.ready import describing, keep_ready, shard_of
from hf_context_parallel.data.shard import shard_batch
from hf_context_parallel.planning.mask import Pattern

from . import report

RANKS, TOKENS = 8, 131_072
SHAPE = Shape(32, 8, 128, 128, torch.bfloat16)
LAYERS = tuple(Layer("auto", Pattern(True, window), SHAPE, "cuda") for window in (None, 4096))
PARTS = ("made ahead", "taken in", "found in the step")


def packed(documents: int) -> dict[str, torch.Tensor]:
    """Make a row of random documents."""
    edges = [0, *sorted(random.sample(range(1, TOKENS), documents - 1)), TOKENS]
    positions = torch.cat([torch.arange(stop - start) for start, stop in zip(edges, edges[1:])])
    ids = torch.randint(0, 1000, (1, TOKENS))
    return {"input_ids": ids, "position_ids": positions[None], "labels": ids}


def times(batch: dict[str, torch.Tensor]) -> list[float]:
    """Measure the seconds of each of `PARTS` for a new batch."""
    config = ContextParallelConfig(size=RANKS)
    worker, rank = (Planner(config, 3, machines("flash_attn")) for _ in range(2))
    worker.meet((LAYERS, {}))
    rank.meet((LAYERS, {}))
    worker.take_made()
    marks = [time.thread_time()]
    local = shard_batch(describing(batch), config, 3)
    worker.plan(local[SHARD].layout, local[SHARD].rows)
    ahead = pickle.dumps((local, worker.take_made()))
    marks.append(time.thread_time())
    local, made = pickle.loads(ahead)
    keep_ready(batch, config, 3, local)
    rank.learn(made)
    marks.append(time.thread_time())
    found = shard_of(describing(batch), config, 3)
    rank.plan(found[SHARD].layout, found[SHARD].rows)
    marks.append(time.thread_time())
    assert found[SHARD] is local[SHARD]
    return [stop - start for start, stop in zip(marks, marks[1:])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 50, 500, 2000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    found = {
        count: [median(part) for part in zip(*(times(packed(count)) for _ in range(options.rounds)))]
        for count in options.documents
    }
    rows = [[f"{count:,}", *(f"{1e3 * seconds:.1f}" for seconds in parts)] for count, parts in found.items()]
    text = "\n\n".join(
        [
            f"The host's milliseconds for a batch of {TOKENS:,} tokens on {RANKS} ranks, two kinds of layers. Medians "
            f"of {options.rounds} batches. A worker of the loader makes shard, layout, choices and strategies ahead. "
            "The rank takes them in when the batch comes, and finds them in its step.",
            report.table(["documents", *PARTS], rows),
            report.described(report.machine()),
        ]
    )
    report.write(options.output, "ahead", "Plans made ahead", text, {"machine": report.machine(), "seconds": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
