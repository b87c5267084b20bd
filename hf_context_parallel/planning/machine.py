"""What work and messages take on a machine: the rates that choices and simulations are made with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Machine:
    """The rates of one rank and of its links.

    Args:
        attention: floating-point operations a second that the attention kernel does.
        linear: the same of matrix products.
        memory: bytes a second that element-wise work reads and writes.
        bandwidth: bytes a second that a rank sends to ranks of its node while it receives as many.
        node_bandwidth: the same to ranks of other nodes.
        latency, node_latency: seconds until a message begins to arrive, within a node and between nodes.
        launch: seconds that a kernel call takes whatever it computes.
        node: ranks of a node.
        cores: ranks of a node that compute at a time, where that may be fewer than it has; the others wait for them.
        overlap: the share of the shorter that is hidden when messages and computing go on at once: 1 where they share
            nothing, 0 where they share the cores.
    """

    attention: float
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

    def transfer(self, near: float, far: float, messages: int = 1) -> float:
        """Seconds that a rank's messages take: bytes that stay on the node, and bytes that leave it."""
        latency = self.node_latency if far else self.latency
        return near / self.bandwidth + far / self.node_bandwidth + messages * latency * bool(near or far)


H100_NODE = Machine(
    attention=450e12,
    linear=600e12,
    memory=2.5e12,
    bandwidth=360e9,
    node_bandwidth=45e9,
    latency=5e-6,
    node_latency=15e-6,
    launch=5e-6,
    node=8,
)
"""An 8-GPU H100 node, bfloat16: attention between what FlashAttention-2 and -3 achieve there (Shah et al., 2024,
arXiv:2407.08608), dense matrix products at three fifths of the peak, three quarters of HBM3 (3.35 TB/s), four fifths
of NVLink 4 (450 GB/s a direction) and nine tenths of one 400 Gb/s link a GPU; latencies and launches are assumed."""

CPU = Machine(
    attention=58e9,
    linear=60e9,
    memory=8e9,
    bandwidth=1e9,
    node_bandwidth=1e9,
    latency=100e-6,
    node_latency=200e-6,
    launch=50e-6,
    node=8,
    overlap=0.0,
)
"""A core of a CPU a rank, float32, and gloo, which copies messages with the same cores and so hides none: fitted so
that choices are those which `benchmarks/attention.py` has found fastest, or near them, on the machines of its results.
The arithmetic is that of the slower one."""

BACKWARD = 2.5
"""Products of attention's backward for each of its forward: five matrix products for two."""


def attention_flops(pairs: int, heads: int, query_dim: int, value_dim: int) -> float:
    """Floating-point operations of a forward pass over query-key pairs: two products, a multiply and an add each."""
    return 2.0 * pairs * heads * (query_dim + value_dim)


def machine_of(device: torch.device, node: int, cores: int | None = None) -> Machine:
    """The rates that choices for a device are made with, for so many ranks of the group and cores a node."""
    return replace(H100_NODE, node=node) if device.type == "cuda" else replace(CPU, node=node, cores=cores)
