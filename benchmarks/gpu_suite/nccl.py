"""Checks of NCCL's process group, in a world of one rank that sends to itself.

In a ring of N ranks this rank gets its own keys N times. So outputs and gradients equal those of one call over its own
keys, up to rounding, if messages have arrived when they are read.
"""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.distributed.messages import GroupExchange, Subset
from hf_context_parallel.distributed.process_groups import _transfers_first, build_groups
from hf_context_parallel.planning.layout import contiguous
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows

from .measure import errors

HEADS, KEY_HEADS, DIM = 16, 4, 128
ALL, ROW = 0.015, 0.08
TURNS = 3


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    if options.device != "cuda":
        return
    torch.cuda.set_device(0)
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for detail in ("OFF", "DETAIL"):
        os.environ["TORCH_DISTRIBUTED_DEBUG"] = detail
        dist.set_debug_level_from_env()
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
            groups = build_groups(1)
            yield {"what": f"group, debug {detail}", "right": groups.device.type == "cuda", "size": groups.size}
            options = _transfers_first()
            group = dist.new_group([0], pg_options=options, timeout=options._timeout)
            yield from ring(group, detail)
            if detail == "OFF":
                yield from memory(group)
            dist.destroy_process_group()


def work_of(group: dist.ProcessGroup, comm_type: str, ranks: int, tokens: int):
    """Make a layer on rank 0 of `ranks`, whose messages all go to this process. Return its tensors and the layer."""
    length = ranks * tokens
    mask = Mask(length, whole_rows(1, length), Pattern(causal=False))
    strategy = build_strategy(comm_type, 1, contiguous(length, ranks), mask, 0)
    torch.manual_seed(0)
    shapes = [(tokens, n, DIM) for n in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    *inputs, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    how = {
        "exchange": Subset(GroupExchange(group), [0] * ranks),
        "kernel": choose_kernel("auto", "cuda"),
        "scores": Scores(DIM**-0.5),
    }

    def layer():
        output = attention(*inputs, strategy=strategy, **how)
        return output, *torch.autograd.grad(output, inputs, grad)

    return inputs, grad, layer


def ring(group: dist.ProcessGroup, detail: str) -> Iterator[dict[str, Any]]:
    for comm_type in ("p2p", "all_gather"):
        (query, key, value), grad, layer = work_of(group, comm_type, 4, 2048)
        for _ in range(TURNS):  # later turns reuse memory
            found = [tensor.detach() for tensor in layer()]
        leaves = [tensor.detach().float().requires_grad_() for tensor in (query, key, value)]
        heads_first = [tensor.transpose(0, 1) for tensor in leaves]
        output = torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(0, 1)
        expected = [output.detach(), *torch.autograd.grad(output, leaves, grad.float())]
        by_tensor = [errors(got, want) for got, want in zip(found, expected)]
        worst = {name: max(error[name] for error in by_tensor) for name in ("all", "row")}
        right = worst["all"] <= ALL and worst["row"] <= ROW
        yield {"what": f"{comm_type} through NCCL, debug {detail}", "right": right, **worst}


def memory(group: dist.ProcessGroup) -> Iterator[dict[str, Any]]:
    """Check that a ring of any size needs three buffers of keys, with the host far ahead of the device."""
    peaks = {}
    for ranks in (4, 16):
        _, _, layer = work_of(group, "p2p", ranks, 8192)
        layer()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda._sleep(1_000_000_000)  # about half a second
        kept = layer()
        torch.cuda.synchronize()
        del kept
        peaks[ranks] = (torch.cuda.max_memory_allocated() - before) / 2**20
    grown = peaks[16] / peaks[4]
    yield {"what": "memory of a ring of 16 against 4", "right": grown < 1.05, "ratio": grown, "MiB of 16": peaks[16]}
