"""Worker processes that run functions as the ranks of process groups, one function after another.

Importing Transformers takes seconds. So one process imports it once, and all workers of all pools are forks of that
process. The functions run in a fork of the worker, which is replaced when too many of their process groups are left.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

MOST_THREADS = 48
"""Threads that a fork may have before another one takes its place.

Each process group of gloo has three threads, which wake up a hundred times a second. Caches and cycles of objects
hold groups that are gone, hundreds of threads after a while. Collecting garbage would not do: a group waits in its
destructor for operations that other ranks have not joined.
"""
DIED = False, "the process died"
"""Answer of a worker whose link has ended. The worker itself may live on for a moment after its fork."""
CROWDED = 3
"""Exit status of a fork that has more threads."""


class WorkerPool:
    """Processes on this machine, without a GPU, that run functions as the ranks of a gloo process group.

    Args:
        workers: largest number of ranks of a group.
        timeout: most seconds that a function may take.
    """

    def __init__(self, workers: int, timeout: float):
        self._workers, self._timeout = workers, timeout
        self._links: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._runs = itertools.count()

    def __call__(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(*args)` on each of `ranks` ranks, and return the results.

        Raises:
            AssertionError: with the tracebacks of the workers, if it raised on any rank.
        """
        if not self._processes:
            self._start()
        store = Path(self._folder.name, f"store{next(self._runs)}")
        task = function.__module__, function.__qualname__, args
        for rank, link in enumerate(self._links[:ranks]):
            link.send((*task, rank, ranks, store, _free_port(), self._timeout))
        answers = self._answers(ranks)
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        # When one rank fails, others lose the connection to it. Their errors are left out.
        failures = [x for x in failures if "gloo/transport" not in x and "DistNetworkError" not in x] or failures
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def _answers(self, ranks: int) -> list[tuple[bool, object]]:
        """Collect the answers of the ranks, or only the failures if not all ranks answer in time.

        A rank may wait forever for one that failed.
        """
        links = {link: rank for rank, link in enumerate(self._links[:ranks])}
        answers: dict[int, tuple[bool, object]] = {}
        patience = self._timeout
        while len(answers) < ranks:
            waiting = [link for link, rank in links.items() if rank not in answers]
            ready = multiprocessing.connection.wait(waiting, patience)
            if not ready:
                self.close()
                late = [rank for rank in range(ranks) if rank not in answers]
                failed = [answer for answer in answers.values() if not answer[0]]
                return failed or [(False, f"ranks {late} of {ranks} did not answer within {self._timeout} s")]
            for link in ready:
                assert isinstance(link, Connection)
                try:
                    answers[links[link]] = link.recv()
                except (EOFError, ConnectionResetError):
                    answers[links[link]] = DIED
                if not answers[links[link]][0]:
                    patience = 2.0  # seconds for the other ranks to fail too
        if DIED in answers.values():
            self.close()
        return [answers[rank] for rank in range(ranks)]

    def _start(self) -> None:
        # Groups use their stores even after their ranks have answered, so the folder lasts as long as the workers.
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch and Transformers come with the package
        for _ in range(self._workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,))
            process.start()
            there.close()  # so that a worker ends when the process that started it has died
            self._links.append(here)
            self._processes.append(process)
        for link in self._links:
            link.recv()  # imports are done, which do not count as time of a function

    def close(self) -> None:
        for process in self._processes:
            assert process.pid is not None
            with suppress(ProcessLookupError):  # it has ended, or has no fork yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._links, self._processes = [], []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _serve(link: Connection) -> None:
    """Fork a process that runs tasks, and another one whenever it is crowded."""
    os.setpgid(0, 0)  # a group of its own, so that its fork is killed with it
    multiprocessing.set_start_method(None, force=True)  # the default again, as in a process that a launcher starts
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    import numpy as np
    import torch

    torch.set_num_threads(1)
    np.random.seed()  # else all workers would draw alike
    gc.freeze()  # what is imported takes half a second of each collection, of which each Trainer makes one
    link.send("ready")
    crowded = True
    while crowded:
        fork = os.fork()
        if not fork:
            os._exit(_run_tasks(link))
        crowded = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == CROWDED


def _run_tasks(link: Connection) -> int:
    """Run tasks, and answer each with its result or its traceback. Return the exit status of this process.

    It is CROWDED if other tasks are to run in another process.
    """
    import torch
    import torch.distributed as dist
    import torch.distributed.tensor.debug as dtensor_debug
    from accelerate.state import AcceleratorState, GradientState, PartialState

    # A fork has lost its thread pool. PyTorch makes it anew here, before two threads ask for it at once.
    torch.set_num_threads(torch.get_num_threads())
    fresh = True
    while True:
        link.poll(None)
        if psutil.Process().num_threads() > MOST_THREADS:
            return CROWDED
        try:
            module, name, args, rank, ranks, store, port, timeout = link.recv()
        except EOFError:
            return 0
        environment = dict(os.environ)
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {key: str(value) for key, value in launched.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            function = getattr(importlib.import_module(module), name)
            if fresh:
                gc.freeze()  # later, it would keep groups that are gone
                fresh = False
            if ranks > 1:
                options = {"rank": rank, "world_size": ranks, "timeout": timedelta(seconds=timeout)}
                dist.init_process_group("gloo", init_method=store.as_uri(), **options)
                dist.barrier()  # else a rank that sends nothing may leave while others still connect to it
            link.send((True, function(*args)))
        except BaseException:  # every failure must be reported to the caller
            link.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            os.environ.clear()  # accelerate writes settings of a run there
            os.environ |= environment
            # DTensor caches results by mesh, and the groups of these meshes are gone now.
            clear_sharding_cache = getattr(dtensor_debug, "_clear_sharding_prop_cache", lambda: None)
            clear_sharding_cache()
            for state in (AcceleratorState, GradientState, PartialState):
                state._shared_state.clear()
