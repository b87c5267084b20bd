"""Run the items of the suite one after another and write `gpu_suite.jsonl` and `gpu_suite.md`.

    python -m benchmarks.gpu_suite --output results
    python -m benchmarks.gpu_suite --device cpu --items calls,races    # the same code on sizes that a CPU can do

The exit code is 0 when every check of every item passed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import report

ITEMS = {
    "facts": 60,
    "calls": 90,
    "nccl": 60,
    "races": 90,
    "models": 120,
    "processes": 120,
    "speed": 180,
    "limits": 90,
    "flash_attn_4": 150,
}
"""Items, the most important first, and the seconds that each may take on a GPU."""
SLOWER = 5
"""Factor of the time limits on a CPU."""


def run_item(name: str, options: argparse.Namespace, log: Path) -> Iterator[dict[str, Any]]:
    """Run one item in a process of its own, and yield its results. The last one says how the item ended."""
    results = options.output / "gpu_suite.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--item", name, "--device", options.device]
    command += ["--output", str(options.output)]
    limit = ITEMS[name] * (SLOWER if options.device == "cpu" else 1)
    start, before = time.perf_counter(), results.stat().st_size if results.exists() else 0
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("a", encoding="utf-8") as output:
        print(f"== {name}", file=output, flush=True)
        try:
            status: int | str = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=limit, env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} s"
    results.touch()  # an item may have ended before its first result
    with results.open(encoding="utf-8") as lines:
        lines.seek(before)
        yield from map(json.loads, lines)
    yield {"item": name, "what": "ended", "right": status == 0, "status": status, "s": time.perf_counter() - start}


def run_here(name: str, options: argparse.Namespace) -> None:
    """Run one item in this process and append each result to `gpu_suite.jsonl` as it comes."""
    with (options.output / "gpu_suite.jsonl").open("a", encoding="utf-8") as file:
        for result in importlib.import_module(f"benchmarks.gpu_suite.{name}").run(options):
            print(json.dumps({"item": name, **result}), file=file, flush=True)


def page(results: list[dict[str, Any]]) -> str:
    """Format a Markdown page: the checks that failed, then a table for each item."""
    checked = [result for result in results if "right" in result]
    wrong = [result for result in checked if not result["right"]]
    parts = [f"{len(checked) - len(wrong)} of {len(checked)} checks passed."]
    if wrong:
        parts += ["## What failed", "\n".join(f"- {shown(result)}" for result in wrong)]
    for name in ITEMS:
        mine = [result for result in results if result["item"] == name]
        if mine:
            parts += [f"## {name}", "\n".join(f"- {shown(result)}" for result in mine)]
    return "\n\n".join(parts)


def shown(result: dict[str, Any]) -> str:
    """Format one result as a line."""
    rest = {key: value for key, value in result.items() if key not in ("item", "what", "right")}
    verdict = {True: "", False: "**WRONG** "}[result.get("right", True)]
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
    parser.add_argument("--item", choices=ITEMS, help="run only this item, in this process")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device. --device cpu tries the same code on small sizes.", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    if options.item:
        run_here(options.item, options)
        return 0
    results = []
    for name in options.items:
        print(f"== {name}", flush=True)
        for result in run_item(name, options, options.output / "gpu_suite.log"):
            print(shown(result), flush=True)
            results.append(result)
    text = f"# What one GPU shows\n\n{page(results)}\n"
    (options.output / "gpu_suite.md").write_text(text, encoding="utf-8")
    return 0 if all(result.get("right", True) for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
