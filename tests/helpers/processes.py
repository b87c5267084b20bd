"""Ranks in processes of their own, which may be killed or stopped without an end of the workers of the suite."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from hf_context_parallel.distributed import worker_pool

SECONDS = 100
"""Seconds that the first rank may take."""


def _rank(link: Connection, rank: int, port: int, timeout: float, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launched.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        found = function(rank, *args)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    link.send(found)
    os._exit(0)


def first_of_two(function: Callable, *args: Any, timeout: float = SECONDS) -> Any:
    """Run `function(rank, *args)` as two ranks, and return the result or the error of the first.

    Args:
        timeout: the timeout of the process group in seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker_pool.__name__, __name__])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, links = [], []
    for rank in range(2):
        here, there = context.Pipe()
        processes.append(context.Process(target=_rank, args=(there, rank, port, timeout, function, args)))
        processes[-1].start()
        there.close()
        links.append(here)
    try:
        assert links[0].poll(SECONDS), "the first rank did not answer"
        return links[0].recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
