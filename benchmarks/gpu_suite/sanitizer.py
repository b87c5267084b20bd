"""Small rings under NVIDIA's compute-sanitizer, which finds accesses outside of the memory that is allocated.

PyTorch caches no memory meanwhile, so memory that is freed is not allocated any more. Where there is no such tool the
rings run without caching alone, and an access to freed memory may end them. `python -m benchmarks.gpu_suite.sanitizer`
is the pass that the tool watches.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .device_tests import ROOT
from .measure import errors
from .races import ALL, ROW, masks, on_one_rank, on_ranks, tensors

TOOL = "compute-sanitizer"
OPTIONS = ("--tool", "memcheck", "--report-api-errors", "no", "--target-processes", "application-only")
OPTIONS += ("--launch-timeout", "90")
"""Calls of CUDA that fail are not reported, since PyTorch and its libraries try some that may. The tool waits for so
many seconds until a program uses CUDA, which this one does when it has imported everything. By default it gives up
after 10, and the program then waits for the tool without end."""
WAYS = ("p2p", "a2a")
BATCHES = ("one document", "a window", "100 documents")
DELAY = 1000
"""Cycles of the device for each message."""
SHOWN = 2000
"""Most characters of the tool's report in the result. The log has all of it."""


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    if options.device == "cpu":
        yield from rings(torch.device("cpu"))
        return
    tool = found()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        watched = [str(tool), *OPTIONS, "--log-file", str(report)] if tool is not None else []
        command = [*watched, sys.executable, "-m", "benchmarks.gpu_suite.sanitizer"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
                else:
                    print(line, end="")  # to the log
        if tool is None:
            what = f"{TOOL} was not found, so memory was not checked; the rings ran without the caching of memory"
            yield {"what": what, "right": process.returncode == 0, "status": process.returncode}
        else:
            text = report.read_text(errors="replace") if report.exists() else ""
            print(text)  # to the log
            yield judged(text, process.returncode)


def judged(report: str, status: int) -> dict[str, Any]:
    """Judge a pass by the tool's report and the status of the pass. A report without a summary is wrong."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", report)
    number = int(summary[1]) if summary else None
    result = {"what": f"{TOOL} memcheck", "right": number == status == 0, "errors": number, "status": status}
    return result if result["right"] else {**result, "report": report[:SHOWN]}


def found() -> Path | None:
    """Find the tool: in PATH, in the folders of CUDA, and in those of pip's packages of NVIDIA."""
    if in_path := shutil.which(TOOL):
        return Path(in_path)
    roots = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    roots += sorted(Path("/usr/local").glob("cuda*"))
    packages = importlib.util.find_spec("nvidia")
    roots += [
        root
        for folder in (packages.submodule_search_locations or () if packages else ())
        for root in sorted(Path(folder).iterdir())
    ]
    files = (root / folder / TOOL for root in roots for folder in ("bin", TOOL))
    return next((file for file in files if file.is_file() and os.access(file, os.X_OK)), None)


def rings(device: torch.device) -> Iterator[dict[str, Any]]:
    """Run forward and backward of each ring on four ranks, and compare with one rank."""
    small = device.type == "cpu"
    by_name = masks(128 if small else 512)
    for name in BATCHES[:1] if small else BATCHES:
        mask = by_name[name]
        whole = tensors(mask, device)
        expected = on_one_rank(mask, whole)
        for comm_type in WAYS:
            pairs = zip(on_ranks(comm_type, mask, whole, DELAY), expected)
            by_tensor = [errors(got, want) for got, want in pairs]
            worst = {key: max(error[key] for error in by_tensor) for key in ("all", "row")}
            right = worst["all"] <= ALL and worst["row"] <= ROW
            yield {"what": f"{comm_type}, {name}", "right": right, **worst}


if __name__ == "__main__":
    for result in rings(torch.device("cuda")):
        print(json.dumps(result), flush=True)
