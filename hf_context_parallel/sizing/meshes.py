"""Meshes of some GPUs: tensor parallelism, context parallelism, FSDP and replicas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..attention.auto_strategy import candidates
from ..attention.strategy import Shape
from ..config import ContextParallelConfig

FEW = 16
"""Data ranks up to which FSDP is tried over every divisor of their number."""


class Mesh(NamedTuple):
    """Division of GPUs.

    TP ranks are neighbours. CP groups are made of data ranks, which are those of FSDP and the replicas.

    Args:
        tp: ranks that share each layer.
        cp: ranks that share each sequence.
        fsdp: ranks over which FSDP2 splits weights, gradients and states of the optimizer. 1 for DDP.
        replicas: copies of the sharded model.
        comm_type: the strategy of CP.
        inner: ranks of a subgroup that exchanges heads.
    """

    tp: int
    cp: int
    fsdp: int
    replicas: int
    comm_type: str = "p2p"
    inner: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.fsdp * self.replicas

    @property
    def groups(self) -> int:
        """Number of sequences that are computed at a time."""
        return self.fsdp * self.replicas // self.cp

    def __str__(self) -> str:
        return f"TP {self.tp} x CP {self.cp}, FSDP {self.fsdp}, {self.replicas} replicas"


def meshes(gpus: int, node: int, heads: int, key_heads: int, may_shard: bool = True) -> Iterator[Mesh]:
    """List the meshes of some GPUs, each with every strategy that its heads allow.

    Args:
        gpus: number of GPUs.
        node: GPUs of a node, which a TP group does not leave.
        heads, key_heads: query heads and key heads of a layer. TP divides both, since a rank has whole heads.
        may_shard: False if tensor parallelism cannot shard the model.
    """
    for tp in _divisors(gpus):
        if tp > 1 and (not may_shard or tp > node or heads % tp or key_heads % tp):
            continue
        shape = Shape(heads // tp, key_heads // tp, 1, 1, None)  # type: ignore[arg-type]
        data = gpus // tp
        for cp in _divisors(data):
            for comm_type, inner in _strategies(cp, shape):
                for fsdp in _shards(data, node // tp):
                    if fsdp % cp == 0 or cp % fsdp == 0:  # a CP group is a part of FSDP's ranks, or some of them whole
                        yield Mesh(tp, cp, fsdp, data // fsdp, comm_type, inner)


def _strategies(cp: int, shape: Shape) -> list[tuple[str, int]]:
    return [("p2p", 1)] if cp == 1 else candidates(ContextParallelConfig(size=cp), shape)


def _shards(data: int, near: int) -> list[int]:
    """List the ranks that FSDP is tried over. Of many GPUs these are none, those of a node, and all."""
    found = _divisors(data)
    return found if data <= FEW else [fsdp for fsdp in found if fsdp in (1, near, data)]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
