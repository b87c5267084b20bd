"""Estimated time of a run of the model on a rank, from the tokens, query-key pairs and keys of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..planning.balanced import LEAST, fewest_chunks
from ..planning.layout import FIXED_LAYOUTS, zigzag
from ..planning.machine import Machine, attention_flops

KERNELS_A_LAYER = 36
"""Kernel calls of a decoder layer, forward and backward, without those of attention."""
KERNELS_A_STEP = 6
"""Kernel calls of a ring step in a layer, forward and backward: a tile, its merge and its gradients."""


class ModelShape(NamedTuple):
    """Sizes of a model that decide the cost of a token.

    Args:
        layers: the number of decoder layers.
        heads, key_heads, head_dim: query heads, key/value heads, and the size of a head.
        parameters: the number of parameters that compute with each token, without embeddings.
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
    """Costs of a run of the model on a rank, forward and backward, in seconds or in any other unit of time.

    Args:
        pair: cost of a query and a key that it reads.
        token: cost of a token without attention.
        least: a lower bound of the cost of all tokens of a run: the time to read or gather the weights.
        run: fixed cost of a run.
        step: cost of each other rank of the group.
        key: cost of receiving the keys of a token and sending their gradients.
        far_key: the same in groups that are larger than a node.
        node: ranks of a node.
        overlap: of computing pairs and moving keys, the share of the shorter that the longer hides, 0 to 1.
        product: cost of a product of two numbers in a tower.
        in_step: True if all ranks wait for each other in every run, as they do when weights are gathered for it.
            Otherwise a rank waits for the ranks of its group alone.
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
    product: float = 0.0
    in_step: bool = False

    @classmethod
    def of(cls, shape: ModelShape, machine: Machine, sharded: bool = False) -> Costs:
        """Estimate the costs of a model on a machine, in seconds.

        Args:
            shape: the sizes of the model.
            machine: the rates of the machine.
            sharded: True if weights are gathered for each run, in forward and in backward, from the ranks of a node.
        """
        weights = shape.parameters * shape.itemsize
        numbers = 2 * shape.key_heads * shape.head_dim  # in the keys and values of a token
        # Keys and values travel in forward and in backward, and their gradients in float32 or a wider dtype.
        sent = shape.layers * numbers * (2 * shape.itemsize + max(shape.itemsize, 4))
        read = 3 * weights / machine.memory
        gathered = 2 * weights * (1 - 1 / machine.node) / machine.bandwidth
        return cls(
            pair=shape.layers * machine.attention(attention_flops(1, shape.heads, shape.head_dim, shape.head_dim)),
            token=6 * shape.parameters / machine.linear,
            least=max(read, gathered) if sharded else read,
            run=shape.layers * KERNELS_A_LAYER * machine.launch,
            step=shape.layers * (KERNELS_A_STEP * machine.launch + 2 * machine.latency),
            key=sent / machine.bandwidth,
            far_key=sent / machine.node_bandwidth,
            node=machine.node,
            overlap=machine.overlap,
            product=2 / machine.linear,  # a product and a sum
            in_step=sharded,
        )

    def sample(self, lengths: np.ndarray, size: int, media: np.ndarray | None = None) -> np.ndarray:
        """Estimate the cost that each sample adds to every rank of a group, `[samples]`, as if it ran alone.

        Args:
            lengths: tokens of each sample.
            size: ranks of the group.
            media: as for `rows`.
        """
        pairs = lengths * (lengths + 1) / 2 / size
        text = self.token * lengths / size + self._attention(pairs, lengths * (size - 1) / size, size)
        return text if media is None else text + self._encoding(media, size)

    def group(self, size: int) -> float:
        """Compute the fixed cost of a run in a group of `size` ranks."""
        return self.run + (size - 1) * self.step

    def rows(
        self,
        lengths: np.ndarray,
        documents: np.ndarray,
        size: int,
        layout: str = "zigzag",
        media: np.ndarray | None = None,
    ) -> np.ndarray:
        """Estimate the cost of a run of each row on its slowest rank, `[rows]`.

        Args:
            lengths, documents, size, layout: as for `counts`.
            media: for each document, the products that towers take for all its items and for the largest,
                `[documents, 2]`.
        """
        tokens = np.diff(_edges(lengths)[_edges(documents)])
        chunks = fewest_chunks(layout) * size
        linear = np.maximum(self.least, self.token * (-(-tokens // chunks) * chunks) / size)
        pairs, keys = counts(lengths, documents, size, layout)
        if layout not in FIXED_LAYOUTS:  # rows that are long enough are balanced
            pairs = np.where((tokens >= LEAST * size)[:, None], pairs.mean(axis=1, keepdims=True), pairs)
        attention = self._attention(pairs, keys, size).max(axis=1)
        encoding: np.ndarray | float = 0.0
        if media is not None:
            begins = _edges(documents)[:-1]
            items = np.add.reduceat(media[:, 0], begins), np.maximum.reduceat(media[:, 1], begins)
            encoding = self._encoding(np.stack(items, axis=1), size)
        return self.group(size) + linear + attention + encoding

    def _encoding(self, media: np.ndarray, size: int) -> np.ndarray:
        """Estimate the cost of towers on the rank with the most items, which are dealt to all ranks of a group."""
        return self.product * np.maximum(media[:, 0] / size, media[:, 1])

    def _attention(self, pairs: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
        computed, moved = self.pair * pairs, (self.key if size <= self.node else self.far_key) * keys
        return np.maximum(computed, moved) + (1 - self.overlap) * np.minimum(computed, moved)


def counts(
    lengths: np.ndarray, documents: np.ndarray, size: int, layout: str = "zigzag"
) -> tuple[np.ndarray, np.ndarray]:
    """Count the query-key pairs that each rank computes, and the tokens whose keys it receives from other ranks.

    Rows are packed causal documents, padded so that all ranks hold equally many tokens.

    Args:
        lengths: tokens of each document, row after row.
        documents: the number of documents of each row.
        size: ranks that share each row.
        layout: the layout of the rows. For one that depends on documents, the counts are those of zigzag.

    Returns:
        Pairs and tokens, each `[rows, size]`.
    """
    owners = np.array(FIXED_LAYOUTS.get(layout, zigzag)(0, size).chunk_owners)
    chunks = owners.argsort(kind="stable").reshape(size, -1)  # chunks of each rank, in the order of the row
    # Positions count on from row to row. A row ends at the first token of the next, which it does not read.
    starts, before = _edges(lengths), _edges(lengths * (lengths + 1) // 2)
    edges = starts[_edges(documents)][:, None]
    begins, ends = edges[:-1], edges[1:]
    share = -(-(ends - begins) // len(owners))
    bounds = np.minimum(begins + share * np.arange(len(owners) + 1), ends)
    document = starts.searchsorted(bounds, side="right") - 1
    inside = bounds - starts[document]
    computed = before[document] + inside * (inside + 1) // 2
    pairs = (computed[:, chunks + 1] - computed[:, chunks]).sum(axis=2)
    # A chunk reads keys from the start of its first token's document, except those that an earlier chunk has read.
    read = np.concatenate([begins[:, :, None].repeat(size, axis=1), bounds[:, chunks[:, :-1] + 1]], axis=2)
    keys = (bounds[:, chunks] - np.maximum(starts[document[:, chunks]], read)).sum(axis=2)
    return pairs, keys


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Compute the edges of consecutive ranges that begin at 0: `[ranges + 1]`."""
    return np.concatenate([[0], np.cumsum(lengths)])
