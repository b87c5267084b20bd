"""One item of the suite in a process of its own, which a crash or a hang ends alone."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from argparse import Namespace
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch


class Item:
    """Process that imports an item, and then waits until it may run.

    So the next item can be imported while one runs. On a CPU the process is a fork of one that has imported all items.
    A fork could not use CUDA if an import had asked for the devices, so there it is a new process.

    Args:
        name: module of the item.
        options: options of the command.
        others: all items.
    """

    def __init__(self, name: str, options: Namespace, others: list[str]):
        self.name, self._results = name, options.output / "gpu_suite.jsonl"
        context = multiprocessing.get_context("forkserver" if options.device == "cpu" else "spawn")
        context.set_forkserver_preload([f"benchmarks.gpu_suite.{other}" for other in others])
        waits, self._begin = context.Pipe(duplex=False)
        self._process = context.Process(target=run_here, args=(name, options, waits))
        self._process.start()
        waits.close()

    def run(self, most: float) -> list[dict[str, Any]]:
        """Run the item for at most `most` seconds, and return its results. The last one says how it ended."""
        start, before = time.perf_counter(), self._results.stat().st_size if self._results.exists() else 0
        with suppress(BrokenPipeError):  # its import failed, which its status tells
            self._begin.send(None)
        try:
            self._process.join(most)
        finally:
            status = f"stopped after {most:.3g} s" if self.end() else self._process.exitcode
        self._results.touch()  # an item may have ended before its first result
        with self._results.open(encoding="utf-8") as lines:
            lines.seek(before)
            written = [json.loads(line) for line in lines if line.endswith("\n")]
        took = time.perf_counter() - start
        ended = {"item": self.name, "what": "ended", "right": status == 0, "status": status, "s": took}
        return [*(result for result in written if result["item"] == self.name), ended]

    def end(self) -> bool:
        """End the process and those that it has started. Return False if it had ended."""
        if not self._process.is_alive():
            return False
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # it may not have a group of its own yet
        self._process.join()
        return True


def run_here(name: str, options: Namespace, waits: Connection) -> None:
    """Run one item in this process and append each result to `gpu_suite.jsonl` as it comes.

    What the item prints goes to `gpu_suite.log`.
    """
    os.setsid()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with (options.output / "gpu_suite.log").open("a", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)
    if options.device == "cpu":
        torch.set_num_threads(1)  # sizes are so small that more would only wait for each other
    run = importlib.import_module(f"benchmarks.gpu_suite.{name}").run
    try:
        waits.recv()
    except EOFError:  # the suite has ended
        return
    print(f"== {name}")
    with (options.output / "gpu_suite.jsonl").open("a", encoding="utf-8") as file:
        for result in run(options):
            print(json.dumps({"item": name, **result}), file=file, flush=True)
