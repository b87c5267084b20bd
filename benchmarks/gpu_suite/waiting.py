"""Checks that the host never waits for the device, in a layer and in a step of training.

The first layer or step with the documents of a batch may wait, since it plans them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch.utils.data import DataLoader

import hf_context_parallel as hcp
from hf_context_parallel.integration.switches import sharded_on_one_rank
from hf_context_parallel.verification.types.tiny import VOCABULARY, tiny_config, tiny_model

from .measure import DTYPES, kernels
from .races import RANKS, WAYS, masks
from .rings import Layer, work_of


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    for kernel in kernels(device):
        for name, mask in masks(8192 if device.type == "cuda" else 256).items():
            for comm_type, inner in WAYS.items():
                layer = Layer(mask, name, comm_type, RANKS, inner, rank=1)
                work = work_of(layer, kernel, device)
                work.both()
                yield no_waiting(f"{kernel.name}, {layer}", work.both, device)
    yield step_of_training(device)


def no_waiting(what: str, work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Run `work` with an error where the host waits. On a CPU it only runs."""
    if device.type == "cpu":
        work()
        return {"what": what}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        calls = [f"{Path(call.filename).name}:{call.lineno}" for call in extract_tb(error.__traceback__)]
        return {"what": what, "right": False, "error": str(error)[:300], "at": calls[-8:]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"what": what, "right": True}


def step_of_training(device: torch.device) -> dict[str, Any]:
    """Train a prepared model for three steps, the third one without waiting. Its batch is on the device before.

    The batches have the same documents.
    """
    lengths = (40, 70, 1, 17)
    positions = torch.cat([torch.arange(length) for length in lengths])
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (3, len(positions)), generator=draw)
    samples = [{"input_ids": ids, "labels": ids, "position_ids": positions} for ids in rows]
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=1))
    model = tiny_model(tiny_config("llama", num_hidden_layers=2), "context_parallel", torch.float32)
    model = hcp.parallelize(model.to(device, DTYPES[device.type]).train(), cp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = iter(cp.prepare_data_loader(DataLoader(samples), device=device))

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    with sharded_on_one_rank():
        for _ in range(2):
            step(next(batches))
        batch = next(batches)
        return no_waiting("step of a prepared model on packed documents", lambda: step(batch), device)
