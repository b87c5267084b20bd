"""Memory that a rank needs at the peak of a layer's attention, estimated from counts.

The peak is in backward. Counted is what is allocated beyond the tensors that backward is given:

- keys/values: this rank's own in one buffer, and those of other ranks, in use and arriving
- sums of gradients, in the accumulation dtype
- the gradients of a kernel call, and what the kernel allocates for itself.
"""

from __future__ import annotations

from typing import NamedTuple

from ..distributed.messages import accumulation_dtype
from .heads import heads_of_groups, most_groups
from .kernels.varlen import MOST_EXPANDED
from .ring_steps import most_owners
from .strategy import Shape

MOST_BYTES = 2**32
"""Bytes at the peak of a layer's attention from which its heads are computed in groups."""


class Temporaries(NamedTuple):
    """Tensors that a kernel allocates in backward beside the gradients that it returns.

    Args:
        queries: float32 tensors in the shape of the queries.
        keys: float32 tensors in the shape of the keys and of the values.
        expanded: True if it first makes the gradients of keys/values for each query head, in their dtype, where query
            heads share key heads.
        rows: rows that each segment adds to the tensors in the shape of the queries.
    """

    queries: int = 1
    keys: int = 0
    expanded: bool = False
    rows: int = 0


FLASH_ATTENTION_2 = Temporaries(expanded=True, rows=128)
FLASH_ATTENTION_3 = Temporaries(keys=1, rows=128)
TEMPORARIES = {
    "torch": FLASH_ATTENTION_2,
    "flash_attn": FLASH_ATTENTION_2,
    "cudnn": FLASH_ATTENTION_2,  # which computes the tiles that cuDNN does not take
    "flash_attn_3": FLASH_ATTENTION_3,
    "flash_attn_4": FLASH_ATTENTION_3,
    "cpu": Temporaries(queries=3, keys=1),
}
"""Temporaries by the name of a kernel, read from its source. Kernels that are not here are taken to have one sum.

FlashAttention-2: `dq_accum`, `dk_expanded` and `dv_expanded` of `csrc/flash_attn/flash_api.cpp`, v2.7.4. Version 3:
`dq_accum`, `dk_accum` and `dv_accum` of `hopper/flash_api.cpp`."""


def peak_of_backward(
    shape: Shape, kernel: str, queries: int, keys: int, segments: int, held: int, sums: int, later: int
) -> float:
    """Estimate the bytes of a layer at the peak of its backward.

    Args:
        shape: heads of the rank, head dims and dtype.
        kernel: name of the kernel.
        queries, keys: tokens of the largest kernel call.
        segments: segments of this call.
        held: tokens whose keys/values are in buffers.
        sums: tokens for which sums of the gradients of keys/values are held during the call.
        later: tokens for which sums are held only when the kernel has freed its temporaries.
    """
    size, total = shape.dtype.itemsize, accumulation_dtype(shape.dtype).itemsize
    query, key_value = shape.heads * shape.query_dim, shape.key_value_numbers
    own = TEMPORARIES.get(kernel, Temporaries())
    temporary = 4 * own.queries * (queries + own.rows * segments) * query + 4 * own.keys * keys * key_value
    if own.expanded and shape.heads != shape.key_heads:
        expanded = keys * shape.heads * (shape.query_dim + shape.value_dim) * size
        temporary += min(expanded, max(MOST_EXPANDED, expanded // shape.key_heads))  # it is cut by groups of key heads
    returned = size * (queries * query + keys * key_value)
    most = max(temporary, later * key_value * total)
    return most + returned + held * key_value * size + (sums * key_value + queries * query) * total


def peak_of_document(
    shape: Shape,
    kernel: str,
    comm_type: str,
    ranks: int,
    inner: int,
    tokens: int,
    groups: int = 1,
    again: bool = False,
) -> float:
    """Estimate the bytes of a layer at the peak of its backward, for one document that all ranks share equally.

    Args:
        shape: heads, head dims and dtype of the layer on a rank, before heads are exchanged.
        comm_type: name of the strategy.
        inner: number of ranks that exchange heads.
        tokens: tokens of a rank.
        groups: number of groups of heads.
        again: True if what backward needs is exchanged in backward, and the rank's own is there too.
    """
    size, peak = shape.dtype.itemsize, results_of_groups(shape, tokens, groups)
    shape = shape_of_group(shape, inner, groups)
    others = (ranks - 1) * tokens
    if ranks > 1 and comm_type == "all_gather":
        whole = tokens + others
        return peak + peak_of_backward(shape, kernel, tokens, whole, 1, tokens + whole, tokens + whole, others)
    if inner > 1:
        heads, key_heads = -(-shape.heads // inner), -(-shape.key_heads // inner)
        shape = shape._replace(heads=heads, key_heads=key_heads)
        tokens *= inner
        exchanged = heads * shape.value_dim  # the gradients of outputs
        if again:
            exchanged += heads * (shape.query_dim + shape.value_dim) + shape.key_value_numbers
        peak += tokens * exchanged * size
    if inner == ranks:  # one call computes all, so nothing is summed: there is what it returns and allocates
        sums = tokens * shape.heads * shape.query_dim * accumulation_dtype(shape.dtype).itemsize
        joined = tokens * shape.key_value_numbers * size  # gradients of keys and of values
        return peak + peak_of_backward(shape, kernel, tokens, tokens, 1, tokens, 0, 0) - sums + joined
    arriving = tokens * most_owners(ranks // inner - 1, tokens, shape)
    held = sums = tokens + 2 * arriving
    return peak + peak_of_backward(shape, kernel, tokens, tokens, 1, held, sums, arriving)


def results_of_groups(shape: Shape, tokens: int, groups: int) -> int:
    """Bytes of the gradients of all heads, which those of a group are written to. One group needs none."""
    numbers = shape.heads * shape.query_dim + shape.key_value_numbers
    return tokens * numbers * shape.dtype.itemsize if groups > 1 else 0


def shape_of_group(shape: Shape, inner: int, groups: int) -> Shape:
    """Shape of the heads of the largest group."""
    found = heads_of_groups(shape.heads, shape.key_heads, inner, groups)
    heads, key_heads = max(found, key=lambda group: len(group[0]))
    return shape._replace(heads=len(heads), key_heads=len(key_heads))


def number_of_groups(
    asked: int | None, shape: Shape, kernel: str, comm_type: str, ranks: int, inner: int, tokens: int
) -> int:
    """Choose the number of groups of heads: as many as are asked for, or the fewest with which attention is small.

    Bytes are counted as for one document whose attention is kept under checkpointing, so the number depends on nothing
    that differs between ranks or passes.

    Args:
        asked: `head_groups` of the settings.
        tokens: tokens of the rank that has most.
    """
    most = most_groups(shape.key_heads, inner)
    if asked is not None:
        return min(asked, most)
    for groups in range(1, most):
        if peak_of_document(shape, kernel, comm_type, ranks, inner, tokens, groups, again=True) <= MOST_BYTES:
            return groups
    return most
