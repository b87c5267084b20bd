"""Times that the host takes for a layer of attention, printed as JSON: a part of `benchmarks/host.py`.

It is a script of its own, so that it also runs on the package of an earlier commit.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from typing import Any

import torch

from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.distributed.messages import Pending
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, from_cu_seqlens

RANKS, TOKENS, HEADS, DIM = 8, 512, 8, 1
"""Few numbers for each token, so that the time is that of calls and not of memory."""
CASES = [
    (f"{name}, {count} document{'s' * (count > 1)}, rank {rank}", comm_type, together, count, rank)
    for name, comm_type, together in (("p2p", "p2p", 1), ("p2p, three owners a step", "p2p", 3), ("a2a", "a2a", 1))
    for count in (1, 500)
    for rank in (0, RANKS - 1)
]


class NullKernel:
    """Kernel that returns tensors of the right shapes, allocated once for each call."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, ...]] = {}

    def forward(self, query: Any, key: Any, value: Any, segments: Any, scores: Any) -> tuple[torch.Tensor, ...]:
        return self._made(query, key, value, segments)[:2]

    def backward(self, grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, segments: Any, scores: Any):
        return self._made(query, key, value, segments)[2:]

    def _made(self, query: Any, key: Any, value: Any, segments: Any) -> tuple[torch.Tensor, ...]:
        if id(segments) not in self._kept:
            queries, keys = (sum(stop - start for start, stop in side) for side in (segments.queries, segments.keys))
            heads, key_heads, dims = query.shape[1], key.shape[1], (key.shape[2], value.shape[2])
            parts = [torch.zeros(keys, key_heads, dim) for dim in dims]
            output, lse = torch.zeros(queries, heads, dims[1]), torch.zeros(queries, heads)
            self._kept[id(segments)] = output, lse, torch.zeros(queries, heads, dims[0]), *parts
        return self._kept[id(segments)]


class NullExchange:
    """Exchange that sends nothing."""

    def post(self, sends: Any, receives: Any) -> Pending:
        return Pending()


def strategy_of(comm_type: str, together: int, documents: int, rank: int) -> Any:
    """Strategy of a rank, or None if the package cannot make it."""
    edges = [index * TOKENS // documents for index in range(documents + 1)]
    mask, inner = Mask(TOKENS, (from_cu_seqlens(torch.tensor(edges), TOKENS),)), RANKS if comm_type == "a2a" else 1
    arguments: list[Any] = [comm_type, inner, zigzag(TOKENS, RANKS), mask, rank]
    if "together" in inspect.signature(build_strategy).parameters:
        arguments.append(together)
    elif together > 1:
        return None
    return build_strategy(*arguments)


def times(strategy: Any, rounds: int) -> tuple[float, float]:
    """Least seconds of the core in forward and in backward, since other processes only make a call take longer."""
    tensors = [torch.zeros(strategy.tokens, HEADS, DIM, requires_grad=True) for _ in range(3)]
    grad = torch.zeros(strategy.tokens, HEADS, DIM)
    how = {"strategy": strategy, "exchange": NullExchange(), "kernel": NullKernel(), "scores": Scores(1.0)}
    forward, backward = [], []
    for _ in range(rounds):
        begin = time.thread_time()
        output = attention(*tensors, **how)
        middle = time.thread_time()
        torch.autograd.grad(output, tensors, grad)
        forward.append(middle - begin)
        backward.append(time.thread_time() - middle)
    return min(forward), min(backward)


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = {name: strategy_of(*case) for name, *case in CASES}
    found = {name: times(strategy, int(sys.argv[1])) for name, strategy in made.items() if strategy is not None}
    print(json.dumps(found))
