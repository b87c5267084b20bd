"""One set of worker processes for the whole suite: importing Transformers takes seconds, so it happens once a worker.

A test hands the pool a function of a test module. Ranks 0 to n - 1 run it inside a gloo process group of n.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

WORKERS = 4
TIMEOUT = 120
"""Seconds that a task may take before the suite gives up on it."""


class WorkerPool:
    """Processes that run functions as the ranks of a process group."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self._links, self._processes = [], []
        for _ in range(WORKERS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,))
            process.start()
            there.close()  # so that a worker whose suite has died reads the end of its link, and ends
            self._links.append(here)
            self._processes.append(process)

    def __call__(self, ranks: int, function, *args) -> list:
        """What `function(*args)` returns on each of `ranks` ranks.

        Raises:
            AssertionError: with the workers' tracebacks, if it raised on any.
        """
        with tempfile.TemporaryDirectory() as folder:
            for rank, link in enumerate(self._links[:ranks]):
                link.send(
                    (function.__module__, function.__qualname__, args, rank, ranks, f"{folder}/store", _free_port())
                )
            answers = []
            for rank, link in enumerate(self._links[:ranks]):
                if not link.poll(TIMEOUT):
                    raise AssertionError(f"rank {rank} of {ranks} did not answer within {TIMEOUT} s")
                answers.append(link.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(link) -> None:
    """A worker's life: run what comes, answer with its result or its traceback."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    torch.set_num_threads(1)
    while True:
        try:
            module, name, args, rank, ranks, store, port = link.recv()
        except EOFError:
            return
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {key: str(value) for key, value in launched.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            if ranks > 1:
                options = {"rank": rank, "world_size": ranks, "timeout": timedelta(seconds=TIMEOUT)}
                dist.init_process_group("gloo", init_method=Path(store).as_uri(), **options)
            link.send((True, getattr(importlib.import_module(module), name)(*args)))
        except BaseException:  # whatever it was, the test must hear of it
            link.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for state in (AcceleratorState, GradientState, PartialState):
                state._shared_state.clear()
