"""Run the items of the suite and write `gpu_suite.jsonl`, `gpu_suite.md` and `gpu_suite.log`.

    python -m benchmarks.gpu_suite --output results
    python -m benchmarks.gpu_suite --device cpu --items calls,races    # the same code on sizes that a CPU can do

Items that time nothing and need little memory run beside each other, before all others, which run one after another.
The exit code is 0 when every item ran to its end and every check passed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import report
from .one_item import Item


class Seconds(NamedTuple):
    """Seconds that an item is expected to take on an H100, and after which it is stopped."""

    expected: int
    most: int


BESIDE = {
    "facts": Seconds(8, 40),
    "calls": Seconds(35, 90),
    "processes": Seconds(40, 120),
    "sanitizer": Seconds(40, 90),
    "nccl": Seconds(20, 60),
    "races": Seconds(20, 90),
    "media": Seconds(30, 120),
    "waiting": Seconds(22, 90),
    "accuracy": Seconds(25, 60),
    "compiled": Seconds(40, 120),
    "device_tests": Seconds(30, 90),
}
"""Items that run beside each other: checks on small tensors."""
ALONE = {
    "models": Seconds(55, 120),
    "rings": Seconds(68, 150),
    "merging": Seconds(8, 60),
    "limits": Seconds(15, 60),
    "memory": Seconds(15, 60),
    "lora_memory": Seconds(25, 90),
    "overlap": Seconds(10, 45),
    "calibrate": Seconds(15, 60),
    "auto_kernel": Seconds(15, 60),
    "flash_attn_4": Seconds(1, 150),
}
"""Items that run alone, the most important first. The last one takes longer where flash-attn-4 is installed."""
ITEMS = BESIDE | ALONE
AT_ONCE = 4
"""Number of items that run beside each other."""
TOTAL = 480
"""Seconds after which no item runs. An item that is not expected to end before is not started."""
SLOWER = 5
"""Factor of all times on a CPU."""


def run_all(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the items and yield their results. An item for which no time is left is a failure."""
    slower, start = SLOWER if options.device == "cpu" else 1, time.perf_counter()

    def run(item: Item) -> list[dict[str, Any]]:
        left = TOTAL * slower - (time.perf_counter() - start)
        expected, most = (seconds * slower for seconds in ITEMS[item.name])
        if left < expected:
            item.end()
            what = f"not started: {left:.0f} of {TOTAL * slower} s are left, and it takes {expected}"
            return [{"item": item.name, "what": what, "right": False}]
        return item.run(min(left, most))

    def made(name: str) -> Item:
        return Item(name, options, list(ITEMS))

    def run_named(name: str) -> list[dict[str, Any]]:
        return run(made(name))

    with ThreadPoolExecutor(1 if options.device == "cpu" else AT_ONCE) as pool:
        for future in as_completed([pool.submit(run_named, name) for name in options.items if name in BESIDE]):
            yield from future.result()
    yield from in_turn([name for name in options.items if name in ALONE], made, run)


def in_turn(
    names: list[str], made: Callable[[str], Item], run: Callable[[Item], list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Run items one after another, each made while the one before runs, and yield their results."""
    upcoming: Item | None = None
    try:
        for name, following in zip(names, [*names[1:], None]):
            item = upcoming or made(name)
            upcoming = made(following) if following is not None else None
            yield from run(item)
    finally:
        if upcoming is not None:
            upcoming.end()


def page(results: list[dict[str, Any]]) -> str:
    """Format a Markdown page: the checks that failed, the results of each item, and a table of the items."""
    wrong = [result for result in results if not result.get("right", True)]
    checked = sum("right" in result for result in results)
    parts = [f"{checked - len(wrong)} of {checked} checks passed."]
    if wrong:
        parts += ["## What failed", "\n".join(f"- {result['item']}: {shown(result)}" for result in wrong)]
    rows = ["| item | checks passed | s | s expected on an H100 |", "|---|---|---|---|"]
    for name, seconds in ITEMS.items():
        mine = [result for result in results if result["item"] == name]
        if not mine:
            continue
        parts += [f"## {name}", "\n".join(f"- {shown(result)}" for result in mine)]
        verdicts = [result["right"] for result in mine if "right" in result]
        rows.append(
            f"| {name} | {sum(verdicts)} of {len(verdicts)} | {mine[-1].get('s', 0):.0f} | {seconds.expected} |"
        )
    return "\n\n".join([*parts, "## All items", "\n".join(rows)])


def shown(result: dict[str, Any]) -> str:
    """Format one result as a line."""
    rest = {key: value for key, value in result.items() if key not in ("item", "what", "right")}
    verdict = "" if result.get("right", True) else "**WRONG** "
    numbers = ", ".join(
        f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in rest.items()
    )
    return f"{verdict}{result['what']}: {numbers}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--items", type=report.comma_separated(), default=list(ITEMS))
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.items if name not in ITEMS]
    if unknown:
        parser.error(f"--items has {', '.join(unknown)}: it takes {', '.join(ITEMS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device. --device cpu tries the same code on small sizes.", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    results = []
    for result in run_all(options):
        print(f"{result['item']}: {shown(result)}", flush=True)
        results.append(result)
    text = f"# What one GPU shows\n\n{page(results)}\n"
    (options.output / "gpu_suite.md").write_text(text, encoding="utf-8")
    return 0 if all(result.get("right", True) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
