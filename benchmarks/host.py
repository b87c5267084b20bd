"""Benchmark of the time that the host takes for a layer of attention, without kernels and messages.

    python -m benchmarks.host --before FOLDER      # the working tree of an earlier commit, to compare with

A kernel returns tensors that were allocated before, and messages are neither sent nor awaited. What is left is
Python, the dispatch of PyTorch, and copies and merges of few numbers. Both versions run in turns.
The time is that of the thread on its core. That of a case is the least of all calls, since other processes of the
machine share its caches, and only make a call take longer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from . import report

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("host_times.py")
Times = dict[str, tuple[float, float]]
"""Seconds of forward and of backward, by case."""


def times(folder: Path, calls: int) -> Times:
    """Measure the package in a folder, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
    command = [sys.executable, "-P", str(SCRIPT), str(calls)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: Times = json.loads(done.stdout)
    return found


def least(found: list[Times]) -> Times:
    """Take the least time of each case and pass."""
    return {name: (min(t[name][0] for t in found), min(t[name][1] for t in found)) for name in found[0]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="folder with the package of an earlier commit")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each version")
    parser.add_argument("--calls", type=int, default=100, help="calls in a process")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    folders = {"now": ROOT} | ({"before": options.before} if options.before else {})
    runs: dict[str, list[Times]] = {name: [] for name in folders}
    for _ in range(options.rounds):
        for name, folder in folders.items():
            runs[name].append(times(folder, options.calls))
    found = {name: least(of_version) for name, of_version in runs.items()}
    headers, rows = ["case", *(f"{name}, ms" for name in ("forward", "backward"))], []
    if options.before:
        headers += ["before, ms", "before, ms", "ratio", "ratio"]
    for name, now in found["now"].items():
        row = [name, *(f"{1e3 * seconds:.2f}" for seconds in now)]
        if options.before:
            # The earlier version may have only one owner a step.
            before = found["before"].get(name) or found["before"][name.replace(", three owners a step", "")]
            row += [f"{1e3 * seconds:.2f}" for seconds in before]
            row += [f"{a / b:.2f}" for a, b in zip(now, before)]
        rows.append(row)
    text = "\n\n".join(
        [
            "The host's time for a layer of 8 ranks, 512 tokens, 8 heads: forward and backward, the least of "
            f"{options.calls} calls in each of {options.rounds} processes.",
            report.table(headers, rows),
            report.described(report.machine()),
        ]
    )
    data = {"machine": report.machine(), "seconds": found}
    report.write(options.output, "host", "The host's time for a layer of attention", text, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
