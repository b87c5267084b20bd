"""Tests that the host does not wait for the device: no layer reads a tensor, once the first one has made indices."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.simulation import ThreadGroup
from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.distributed import buffers
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, Pattern
from tests.helpers.simulated import cut

READS = {"item", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2"}
"""Operators for whose result, or its shape, the host waits."""
WAYS = {"p2p": 1, "all_gather": 1, "a2a": 4, "a2a+p2p": 2}
LENGTH = 800


class Reads(TorchDispatchMode):
    """Mode that lists the operators of its thread by which the host reads a tensor, or copies one to a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, values = func.overloadpacket.__name__, [*args, *(kwargs or {}).values()]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_boolean = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        to_device = name == "_to_copy" and "device" in (kwargs or {}) and kwargs["device"] is not None
        lifted = name.startswith("lift_fresh")  # a tensor made of Python numbers
        if name in READS or by_boolean or to_device or lifted:
            self.found.append((name, [x for x in values if not isinstance(x, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


def reads_of_second_layer(rank, exchange, way, mask, sinks):
    """List what the host reads in forward and backward of a layer whose plan an earlier layer has executed."""
    strategy = build_strategy(way, WAYS[way], zigzag(mask.length, 4), mask, rank, 2)
    random = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(strategy.tokens, heads, 8, generator=random).requires_grad_() for heads in (4, 4, 4)]
    leaves = [*tensors, sinks] if sinks is not None else tensors
    kernel = choose_kernel("reference", "cpu")
    how = {"strategy": strategy, "exchange": exchange, "kernel": kernel, "scores": Scores(0.3), "sinks": sinks}
    first = torch.autograd.grad(attention(*tensors, **how).sum(), leaves)
    with Reads() as reads:
        second = torch.autograd.grad(attention(*tensors, **how).sum(), leaves)
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(first[1:], second[1:]))
    return reads.found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["100 documents", "a window", "sinks"])
def test_no_layer_reads_a_tensor(way, kind, monkeypatch):
    monkeypatch.setattr(buffers, "SMALL", 1 << 40)  # the pool of buffers on the CPU makes tensors of arrays
    edges = [LENGTH * number // 100 for number in range(1, 100)] if kind == "100 documents" else []
    mask = Mask(LENGTH, (cut(edges, LENGTH),), Pattern(sliding_window=100 if kind == "a window" else None))
    sinks = torch.zeros(4, requires_grad=True) if kind == "sinks" else None
    found = ThreadGroup(4).run(lambda rank, exchange: reads_of_second_layer(rank, exchange, way, mask, sinks))
    assert found == [[]] * 4


def test_reads_are_found():
    x = torch.arange(3.0)
    with Reads() as reads:
        x[x > 1], x.sum().item(), bool(x[0] == 0), x.nonzero(), torch.tensor(1.0)
    assert {name for name, _ in reads.found} == {"index", "_local_scalar_dense", "nonzero", "lift_fresh"}
