"""Benchmark of towers that the ranks of a CP group share: the time of a rank, over that of the same tower whole.

    python -m benchmarks.towers

The tower is that of a Qwen2.5-VL with few and narrow layers. It encodes eight images of different sizes, in forward
and backward: shared by the ranks, and whole on every rank, as without sharing. Both take turns in each round, and a
round takes as long as its slowest rank. Shares of costs, patches and pairs are counted beside.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import hf_context_parallel as hcp
from hf_context_parallel.distributed.worker_pool import WorkerPool
from hf_context_parallel.integration.outer_call import OuterCall, in_call
from hf_context_parallel.integration.switches import allow_unchecked_models
from hf_context_parallel.integration.towers.dealing import dealt
from hf_context_parallel.memory.tower_facts import TowerSizes

from . import report
from .turns import in_turns, timed

TIMEOUT = 900
GRIDS = ((1, 8, 8), (1, 36, 48), (1, 16, 12), (1, 24, 32), (1, 12, 20), (1, 36, 28), (1, 8, 44), (1, 20, 20))
"""Frames, rows and columns of patches of each image."""
TOWER = {"hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "out_hidden_size": 64, "patch_size": 14}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 256, "bos_token_id": None, "eos_token_id": None}


def configuration(layers: int) -> Qwen2_5_VLConfig:
    """Make the configuration of a model. The last layer of its tower has no windows."""
    tower = {**TOWER, "depth": layers, "fullatt_block_indexes": [layers - 1], "window_size": 112}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    return Qwen2_5_VLConfig(vision_config=tower, text_config={**TEXT, "rope_parameters": rope})


def times(images: int, layers: int, rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of this rank in turns, by kind.

    Raises:
        ValueError: if the features differ.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = configuration(layers)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="context_parallel").train()
    with allow_unchecked_models():
        hcp.parallelize(model, hcp.ContextParallel(hcp.ContextParallelConfig(size=dist.get_world_size())))
    grids = torch.tensor(GRIDS[:images])
    pixels = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * 14**2)

    def encode(call: OuterCall | None) -> torch.Tensor:
        model.zero_grad()
        with in_call(call):
            features = torch.cat(model.model.get_image_features(pixels, grids, return_dict=True).pooler_output)
        features.pow(2).mean().backward()
        return features.detach()

    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "whole": lambda: encode(None),
        "shared": lambda: encode(OuterCall(model, model.get_decoder(), {}, is_alone=False)),
    }
    kinds["shared"]()  # a trial
    features = {kind: run() for kind, run in kinds.items()}
    if not torch.allclose(features["whole"], features["shared"], rtol=1e-4, atol=1e-5):
        raise ValueError("the features of the shared tower are not those of the whole one.")
    return in_turns({kind: timed(run, before=dist.barrier) for kind, run in kinds.items()}, rounds)


def counted(images: int, layers: int, ranks: int) -> dict[str, float]:
    """Compute the largest share of a rank: of costs, patches and pairs of patches."""
    sizes, grids = TowerSizes.of(configuration(layers).vision_config), GRIDS[:images]
    shares = dealt([sizes.cost(*grid) for grid in grids], ranks)
    counts: dict[str, Callable[..., int]] = {
        "cost": sizes.cost,
        "patches": lambda frames, rows, columns: frames * rows * columns,
        "pairs": sizes.pairs,
    }
    numbers = {name: [count(*grid) for grid in grids] for name, count in counts.items()}
    return {name: max(sum(x[item] for item in share) for share in shares) / sum(x) for name, x in numbers.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--images", type=int, default=len(GRIDS), help="number of images")
    parser.add_argument("--layers", type=int, default=4, help="layers of the tower")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    pool = WorkerPool(options.ranks, TIMEOUT)
    by_rank = pool(options.ranks, times, options.images, options.layers, options.rounds)
    pool.close()
    seconds = {kind: [max(values) for values in zip(*(x[kind] for x in by_rank))] for kind in by_rank[0]}
    ratios = [b / a for a, b in zip(seconds["whole"], seconds["shared"])]
    shares = counted(options.images, options.layers, options.ranks)
    middle = {kind: median(values) for kind, values in seconds.items()}
    lines = [
        ["whole", f"{1e3 * middle['whole']:.0f}", "1.00"],
        ["shared", f"{1e3 * middle['shared']:.0f}", f"{median(ratios):.2f}"],
    ]
    patches = [rows * columns for _, rows, columns in GRIDS[: options.images]]
    text = "\n\n".join(
        [
            f"A tower of Qwen2.5-VL of {options.layers} layers, width {TOWER['hidden_size']}, forward and backward of "
            f"{len(patches)} images of {min(patches):,} to {max(patches):,} patches, float32, {options.ranks} ranks "
            f"of one thread; the time of the slowest rank, the median of {options.rounds} rounds. The ratio is the "
            "median of the ratios of rounds.",
            report.table(["tower", "ms", "of whole"], lines),
            "The largest share of a rank, counted: "
            + ", ".join(f"{share:.2f} of the {name}" for name, share in shares.items())
            + ".",
            report.described(report.machine()),
        ]
    )
    data: dict[str, Any] = {"machine": report.machine(), "seconds": seconds, "ratio": median(ratios), "shares": shares}
    report.write(options.output, "towers", "Towers that ranks share", text, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
