"""Rings of ranks in threads, with slow messages on streams of their own, compared bit by bit with a single stream.

Memory that is used or freed too early changes bits, even where a tolerance would hide it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch

from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.distributed import side_stream
from hf_context_parallel.distributed.messages import GroupExchange
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, from_cu_seqlens, whole_rows

from ..simulation import ThreadGroup
from .measure import DTYPES, errors

RANKS, DELAY = 4, 1_000_000  # in cycles, about half a millisecond for each message
WAYS = {"p2p": 1, "all_gather": 1, "a2a": 4, "a2a+p2p": 2}
HEADS, KEY_HEADS, DIM = 8, 4, 128
ALL, ROW = 0.015, 0.08
"""Largest errors against float32 on one rank that are explained by bfloat16, of whole tensors and of a row."""


def masks(length: int) -> dict[str, Mask]:
    edges = torch.linspace(0, length, 101).round().long()
    return {
        "one document": Mask(length, whole_rows(1, length)),
        "a window": Mask(length, whole_rows(1, length), Pattern(sliding_window=length // 9)),
        "100 documents": Mask(length, (from_cu_seqlens(edges, length),)),
        "two rows": Mask(length, whole_rows(2, length)),
    }


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    small = device.type == "cpu"
    for name, mask in list(masks(256 if small else 8192).items())[:: 2 if small else 1]:
        whole = tensors(mask, device)
        expected = on_one_rank(mask, whole)
        for comm_type in WAYS:
            apart, together = (on_ranks(comm_type, mask, whole, delay) for delay in (DELAY, 0))
            same = all(torch.equal(a, b) for a, b in zip(apart, together))
            found = [errors(got, want) for got, want in zip(apart, expected)]
            worst = {key: max(error[key] for error in found) for key in ("all", "row")}
            right = same and worst["all"] <= ALL and worst["row"] <= ROW
            yield {"what": f"{comm_type}, {name}", "right": right, "same bits": same, **worst}


def tensors(mask: Mask, device: torch.device) -> list[torch.Tensor]:
    """Make query, key, value, the output's gradient `[B, H, S, D]`, and sinks `[H]` large enough to matter."""
    torch.manual_seed(0)
    shapes = [(len(mask.rows), n, mask.length, DIM) for n in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    made = [torch.randn(shape, device=device, dtype=DTYPES[device.type]) for shape in shapes]
    return [*made, torch.linspace(0, 5, HEADS, device=device)]


def computed(inputs: list[torch.Tensor], strategy, exchange, kernel) -> list[torch.Tensor]:
    """Compute the output and all gradients, tokens first."""
    *inputs, grad, sinks = inputs
    leaves = [tensor.transpose(1, 2).flatten(0, 1).detach().requires_grad_() for tensor in inputs]
    sinks = sinks.detach().requires_grad_()
    scores = Scores(DIM**-0.5, deterministic=True)
    output = attention(*leaves, strategy=strategy, exchange=exchange, kernel=kernel, scores=scores, sinks=sinks)
    grad = grad.transpose(1, 2).flatten(0, 1)
    return [output.detach(), *torch.autograd.grad(output, [*leaves, sinks], grad)]


def on_one_rank(mask: Mask, whole: list[torch.Tensor]) -> list[torch.Tensor]:
    """Compute all results in float32 with the reference kernel."""
    strategy = build_strategy("p2p", 1, zigzag(mask.length, 1), mask, 0)
    exact = [tensor.float() for tensor in whole]
    *by_token, sinks = computed(exact, strategy, GroupExchange(None), choose_kernel("reference", whole[0].device.type))
    return [*by_token, sinks[:, None]]


def on_ranks(comm_type: str, mask: Mask, whole: list[torch.Tensor], delay: int) -> list[torch.Tensor]:
    """Compute the results of all ranks, in the order of the sequence. Without a delay, all work is on one stream."""
    layout, kernel = zigzag(mask.length, RANKS), choose_kernel("auto", whole[0].device.type)
    positions = [layout.positions(rank).to(whole[0].device) for rank in range(RANKS)]

    def work(rank, exchange):
        strategy = build_strategy(comm_type, WAYS[comm_type], layout, mask, rank)
        shard = [tensor[:, :, positions[rank]] for tensor in whole[:4]]
        return computed([*shard, whole[4]], strategy, exchange, kernel)

    one_stream = mock.patch.object(side_stream, "_beside", torch.cuda.current_stream)
    with nullcontext() if delay else one_stream:
        results = zip(*ThreadGroup(RANKS, delay, apart=bool(delay)).run(work))
    *by_token, sinks = results
    order = torch.cat(positions).argsort()
    rows = len(mask.rows)
    joined = [torch.cat([p.unflatten(0, (rows, -1)) for p in parts], 1)[:, order].flatten(0, 1) for parts in by_token]
    return [*joined, sum(sinks)[:, None]]
