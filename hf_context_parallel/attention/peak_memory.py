"""Memory that a rank needs at the peak of a layer's attention, estimated from counts.

The peak is in backward. Counted is what is allocated beyond the tensors that backward is given:

- keys/values: this rank's own in one buffer, and those of other ranks, in use and arriving
- sums of gradients, in the accumulation dtype
- the gradients of a kernel call, and what the kernel allocates for itself.
"""

from __future__ import annotations

from typing import NamedTuple

from ..distributed.messages import accumulation_dtype
from .kernels.varlen import MOST_EXPANDED
from .strategy import Shape


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
