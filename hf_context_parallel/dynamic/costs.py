"""What a rank spends on a run of the model, by the tokens, pairs and keys of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..planning.layout import FIXED_LAYOUTS
from ..planning.machine import BACKWARD, Machine, attention_flops

KERNELS_A_LAYER = 36
"""Kernel calls of a decoder layer, forward and backward, beside attention's."""
KERNELS_A_STEP = 6
"""Kernel calls of a ring's step in a layer, forward and backward: a tile, its merge and its gradients."""


class ModelShape(NamedTuple):
    """What of a model decides what a token costs.

    Args:
        layers: decoder layers.
        heads, key_heads, head_dim: of attention.
        parameters: that a token meets, without embeddings.
        itemsize: bytes of a number in weights and keys.
    """

    layers: int
    heads: int
    key_heads: int
    head_dim: int
    parameters: int
    itemsize: int = 2


LLAMA_8B = ModelShape(layers=32, heads=32, key_heads=8, head_dim=128, parameters=7_500_000_000)


@dataclass(frozen=True)
class Costs:
    """What a rank spends on a run of the model, forward and backward: in seconds, or in any other unit of work.

    Args:
        pair: for a query and a key that it reads.
        token: for a token, apart from attention.
        least: for all of a run's tokens together, however few (weights are read, or gathered, for them).
        run: for a run, whatever it holds.
        step: for each other rank of its group.
        key: for a token's keys to arrive and their gradients to leave, while pairs are computed.
        far_key: the same in groups that are larger than a node.
        node: ranks of a node.
        overlap: the share of the shorter of computing pairs and moving keys that is hidden.
        in_step: whether all ranks wait for each other in every run, as they do where weights are gathered for it, or
            for the ranks of their group alone.
    """

    pair: float
    token: float
    least: float = 0.0
    run: float = 0.0
    step: float = 0.0
    key: float = 0.0
    far_key: float = 0.0
    node: int = 8
    overlap: float = 1.0
    in_step: bool = False

    @classmethod
    def of(cls, shape: ModelShape, machine: Machine, sharded: bool = False) -> Costs:
        """A model's costs on a machine.

        Args:
            sharded: whether weights are gathered for each run, in forward and in backward, from the ranks of a node.
        """
        weights = shape.parameters * shape.itemsize
        numbers = 2 * shape.key_heads * shape.head_dim  # of a token's keys and values
        # Those travel in forward and in backward, and their gradients in float32 or what is wider.
        sent = shape.layers * numbers * (2 * shape.itemsize + max(shape.itemsize, 4))
        read = 3 * weights / machine.memory
        gathered = 2 * weights * (1 - 1 / machine.node) / machine.bandwidth
        return cls(
            pair=shape.layers
            * (1 + BACKWARD)
            * attention_flops(1, shape.heads, shape.head_dim, shape.head_dim)
            / machine.attention,
            token=6 * shape.parameters / machine.linear,
            least=max(read, gathered) if sharded else read,
            run=shape.layers * KERNELS_A_LAYER * machine.launch,
            step=shape.layers * (KERNELS_A_STEP * machine.launch + 2 * machine.latency),
            key=sent / machine.bandwidth,
            far_key=sent / machine.node_bandwidth,
            node=machine.node,
            overlap=machine.overlap,
            in_step=sharded,
        )

    def sample(self, lengths: np.ndarray, size: int) -> np.ndarray:
        """What each sample adds to every rank of a group, at most: as if it were alone there."""
        pairs = lengths * (lengths + 1) / 2 / size
        return self.token * lengths / size + self._attention(pairs, lengths * (size - 1) / size, size)

    def group(self, size: int) -> float:
        """What a run takes in a group of `size`, whatever it holds."""
        return self.run + (size - 1) * self.step

    def rows(self, lengths: np.ndarray, documents: np.ndarray, size: int, layout: str = "zigzag") -> np.ndarray:
        """`[rows]`: what a run of each takes on the rank that needs longest. Arguments are those of `counts`."""
        tokens = np.diff(_edges(lengths)[_edges(documents)])
        chunks = len(FIXED_LAYOUTS[layout](0, size).chunk_owners)
        linear = np.maximum(self.least, self.token * (-(-tokens // chunks) * chunks) / size)
        attention = self._attention(*counts(lengths, documents, size, layout), size).max(axis=1)
        return self.group(size) + linear + attention

    def _attention(self, pairs: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
        computed, moved = self.pair * pairs, (self.key if size <= self.node else self.far_key) * keys
        return np.maximum(computed, moved) + (1 - self.overlap) * np.minimum(computed, moved)


def counts(
    lengths: np.ndarray, documents: np.ndarray, size: int, layout: str = "zigzag"
) -> tuple[np.ndarray, np.ndarray]:
    """`[rows, size]`: the query-key pairs that each rank computes, and the tokens whose keys it gets from others.

    Rows are causal documents, packed, and padded to equal shares.

    Args:
        lengths: tokens of all documents, one row's after another's.
        documents: how many each row has.
        size: ranks that each row is dealt to.
    """
    owners = np.array(FIXED_LAYOUTS[layout](0, size).chunk_owners)
    chunks = owners.argsort(kind="stable").reshape(size, -1)  # of each rank, in the order of the row
    # Positions count on from row to row: a row ends where the next one's document begins, and has read nothing of it.
    starts, before = _edges(lengths), _edges(lengths * (lengths + 1) // 2)
    edges = starts[_edges(documents)][:, None]
    begins, ends = edges[:-1], edges[1:]
    share = -(-(ends - begins) // len(owners))
    bounds = np.minimum(begins + share * np.arange(len(owners) + 1), ends)
    document = starts.searchsorted(bounds, side="right") - 1
    inside = bounds - starts[document]
    computed = before[document] + inside * (inside + 1) // 2
    pairs = (computed[:, chunks + 1] - computed[:, chunks]).sum(axis=2)
    # A chunk reads from its first token's document's start on, unless the rank's earlier chunk has read that.
    read = np.concatenate([begins[:, :, None].repeat(size, axis=1), bounds[:, chunks[:, :-1] + 1]], axis=2)
    keys = (bounds[:, chunks] - np.maximum(starts[document[:, chunks]], read)).sum(axis=2)
    return pairs, keys


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Where ranges begin that follow each other from 0 on, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)])
