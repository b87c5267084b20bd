"""Rates of a machine, from which the `auto` strategy and simulations estimate times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

BACKWARD = 2.5
"""Work of attention's backward over that of its forward: five matrix products against two."""


def attention_flops(pairs: int, heads: int, query_dim: int, value_dim: int) -> float:
    """Floating-point operations of a forward pass over query-key pairs.

    There are two matrix products. Each element of them takes a multiply and an add.
    """
    return 2.0 * pairs * heads * (query_dim + value_dim)


@dataclass(frozen=True)
class Machine:
    """Rates of one rank and of its links.

    Args:
        forward, backward: floating-point operations a second of the attention kernel, in each pass.
        linear: floating-point operations a second of matrix products.
        memory: bytes a second that element-wise work reads and writes.
        bandwidth: bytes a second that a rank sends to ranks of its node, while it receives as many.
        node_bandwidth: bytes a second that a rank sends to ranks of other nodes, while it receives as many.
        latency, node_latency: seconds until a message begins to arrive, within a node and between nodes.
        launch: seconds that any kernel call takes, in addition to its work.
        node: number of ranks of a node.
        cores: number of ranks of a node that compute at the same time. None if all of them do.
        overlap: share of the shorter time that is hidden when messages and computing run at the same time: 1 if they
            share no hardware, 0 if they share the cores.
        kernel: name of the attention kernel.
        source: where the rates are from, in words.
    """

    forward: float
    backward: float
    linear: float
    memory: float
    bandwidth: float
    node_bandwidth: float
    latency: float
    node_latency: float
    launch: float
    node: int
    overlap: float = 1.0
    cores: int | None = None
    kernel: str = ""
    source: str = ""

    def attention(self, flops: float) -> float:
        """Seconds of attention in both passes, if the forward pass takes `flops` operations."""
        return flops / self.forward + BACKWARD * flops / self.backward

    def transfer(self, near: float, far: float, messages: int = 1) -> float:
        """Seconds that a rank's messages take, with `near` bytes within the node and `far` bytes to other nodes."""
        latency = self.node_latency if far else self.latency
        return near / self.bandwidth + far / self.node_bandwidth + messages * latency * bool(near or far)


H100_KERNELS = {
    "torch": (347e12, 310e12),
    "flash_attn": (347e12, 310e12),
    "cudnn": (626e12, 553e12),
    "flash_attn_3": (620e12, 500e12),
    "flash_attn_4": (636e12, 582e12),
}
"""Operations a second of each kernel in forward and backward, for one causal call of 16,384 tokens in bfloat16.

The first three are measured (`benchmarks/results/h100.md`); `torch` and `flash_attn` are both FlashAttention-2. Those
of FlashAttention-3 are read off the figures of Shah et al. (2024, arXiv:2407.08608). FlashAttention-4 is measured on
an H200, which computes like an H100 (`benchmarks/results/h200.md`)."""

H100_NODE = Machine(
    *H100_KERNELS["torch"],
    linear=600e12,
    memory=2.5e12,
    bandwidth=360e9,
    node_bandwidth=45e9,
    latency=5e-6,
    node_latency=15e-6,
    launch=5e-6,
    node=8,
    kernel="torch",
    source="the built-in rates of H100 nodes",
)
"""Node of eight H100 GPUs, in bfloat16.

Dense matrix products run at three fifths of the peak. Memory runs at three quarters of HBM3 (3.35 TB/s), messages
within a node at four fifths of NVLink 4 (450 GB/s a direction), and messages between nodes at nine tenths of one
400 Gb/s link a GPU. Latencies and launches are assumed."""

CPU = Machine(
    forward=58e9,
    backward=58e9,
    linear=60e9,
    memory=2e9,
    bandwidth=0.7e9,
    node_bandwidth=0.7e9,
    latency=2e-3,
    node_latency=2e-3,
    launch=50e-6,
    node=8,
    overlap=0.0,
    kernel="cpu",
    source="the built-in rates of a CPU core",
)
"""One CPU core for each rank, in float32, with messages through shared memory.

The same cores copy messages, so computing hides none of them. The rates are fitted: with them, `auto` chooses a
strategy that `benchmarks/attention.py` measured to be fastest, or near it, on the machines of its results. A message
takes long since a rank waits until the system lets its peer run, on cores that ranks share."""


class Calibration(NamedTuple):
    """Rates that were measured on a machine: fields of `Machine` by name, and the day."""

    rates: Mapping[str, Any]
    date: str


def machine_of(
    device: torch.device,
    node: int,
    cores: int | None = None,
    kernel: str | None = None,
    calibration: Calibration | None = None,
) -> Machine:
    """Rates that estimates for a device use.

    Args:
        device: the device. Of its type, the built-in rates are those of an H100 or of a CPU core.
        node: ranks of the group on a node.
        cores: cores of a node, if the device is a CPU.
        kernel: name of the attention kernel; `"torch"` or `"cpu"` unless given. A kernel without built-in rates has
            those of one of these.
        calibration: rates that replace built-in ones.
    """
    if device.type == "cuda":
        kernel = kernel or H100_NODE.kernel
        forward, backward = H100_KERNELS.get(kernel, H100_KERNELS["torch"])
        machine = replace(H100_NODE, forward=forward, backward=backward, node=node, kernel=kernel)
    else:
        machine = replace(CPU, node=node, cores=cores, kernel=kernel or CPU.kernel)
    if calibration is None:
        return machine
    return replace(machine, **calibration.rates, source=f"the rates that were calibrated on {calibration.date}")
