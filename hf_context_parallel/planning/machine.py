"""Rates of a machine, from which the `auto` strategy and simulations estimate times."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Machine:
    """Rates of one rank and of its links.

    Args:
        attention: floating-point operations a second of the attention kernel.
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
        """Seconds that a rank's messages take, with `near` bytes within the node and `far` bytes to other nodes."""
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
"""Node of eight H100 GPUs, in bfloat16.

Attention lies between the rates of FlashAttention-2 and -3 (Shah et al., 2024, arXiv:2407.08608). Dense matrix
products run at three fifths of the peak. Memory runs at three quarters of HBM3 (3.35 TB/s), messages within a node at
four fifths of NVLink 4 (450 GB/s a direction), and messages between nodes at nine tenths of one 400 Gb/s link a GPU.
Latencies and launches are assumed."""

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
"""One CPU core for each rank, in float32, with gloo.

Gloo copies messages with the same cores, so computing hides none of them. The rates are fitted: with them, `auto`
chooses a strategy that `benchmarks/attention.py` measured to be fastest, or near it, on the machines of its results.
The arithmetic is that of the slower machine."""

BACKWARD = 2.5
"""Work of attention's backward over that of its forward: five matrix products against two."""


def attention_flops(pairs: int, heads: int, query_dim: int, value_dim: int) -> float:
    """Floating-point operations of a forward pass over query-key pairs.

    There are two matrix products. Each element of them takes a multiply and an add.
    """
    return 2.0 * pairs * heads * (query_dim + value_dim)


def machine_of(device: torch.device, node: int, cores: int | None = None) -> Machine:
    """Rates that estimates for a device use, with `node` ranks of the group and `cores` cores on a node."""
    return replace(H100_NODE, node=node) if device.type == "cuda" else replace(CPU, node=node, cores=cores)
