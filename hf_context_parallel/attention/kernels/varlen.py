"""Base class of the CUDA flash-attention kernels: one call over packed rows with cumulative lengths.

FlashAttention takes head dims that are multiples of 8, up to 256. The dtype is bfloat16 or float16. Other head dims
are padded with zeros, which changes neither scores nor outputs.

One call of a kernel is several calls of the library where one would be wrong, need too much memory or be slow: calls
beyond 32-bit offsets are cut by heads, and segments of very different lengths are sorted by length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...distributed.host import to_device
from ...planning.intervals import Interval
from ...planning.tiles import CAUSAL, FULL, Segments, take
from ..scores import Scores
from .base import Kernel

MOST_ELEMENTS = 2**31 - 1
"""Largest offset that a library may compute in 32 bits, beyond which it is wrong. FlashAttention-2 does so in the sums
of gradients (`row_offset_dq_accum`), FlashAttention-4 in rows of outputs and their gradients (`_bwd_preprocess`)."""
MOST_EXPANDED = 2**31
"""Most bytes of key and value gradients that a library holds for each query head before it sums them, 2 GiB. With
more, key heads are computed one group after another. A group has one key head at least, whatever its bytes."""
MOST_EMPTY = 16
"""Most blocks of a grid for each block with work. More take longer to start (200 in a microsecond) than it takes to
copy all rows in the order of their lengths and back (at 2.5 TB/s)."""
BLOCK = 128
"""Rows of a block of a grid. Sums of gradients have as many more for each segment."""


class Lengths(NamedTuple):
    """Cumulative lengths of query and key ranges, `[segments + 1]` int32, and upper bounds of the lengths.

    The order is that of the arguments of varlen kernels.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int


class Window(NamedTuple):
    """Band in the form of FlashAttention: aligned at the bottom right. None means no limit."""

    causal: bool
    left: int | None
    right: int | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Left and right limit, with -1 for no limit."""
        return -1 if self.left is None else self.left, -1 if self.right is None else self.right


class Side(NamedTuple):
    """Queries or keys of a call, and how calls of the library share their rows.

    Args:
        runs: ranges of rows.
        sizes: number of rows of each call of the library.
        order: for each row in the order of the calls, its place in `runs`; `[rows]`, or None if they are in order.
        back: the inverse of `order`.
    """

    runs: tuple[Interval, ...]
    sizes: list[int]
    order: torch.Tensor | None = None
    back: torch.Tensor | None = None

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take the rows of each call of the library from a tensor."""
        rows = take(tensor, self.runs)
        parts: tuple[torch.Tensor, ...]
        parts = (rows if self.order is None else rows.index_select(0, self.order)).split(self.sizes)
        return parts

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Put the rows of all calls of the library in the order of the ranges."""
        rows = _cat(parts, 0)
        return rows if self.back is None else rows.index_select(0, self.back)


class Calls(NamedTuple):
    """Calls of the library that compute one call of a kernel."""

    lengths: list[Lengths]
    queries: Side
    keys: Side


class VarlenKernel(Kernel):
    """Kernel that computes all segments of a call at once, or of some heads or lengths at a time."""

    short_offsets = True
    """True if the library computes offsets in 32 bits over all heads, False if over one head."""
    expands_keys = False
    """True if the library holds gradients of keys and values for each query head."""
    grid_of_longest = False
    """True if the library starts as many blocks for each segment as for the longest one."""
    devices = "8.0 (Ampere) or later"
    """Compute capabilities that `runs_on` takes, in words."""

    @staticmethod
    def runs_on(capability: tuple[int, int]) -> bool:
        """Return True if the kernel runs on devices of a compute capability."""
        return capability >= (8, 0)

    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        if device.type != "cuda":
            return f"it runs on CUDA, but the tensors are on {device}. Use kernel='auto'"
        if torch.cuda.is_available() and not self.runs_on(torch.cuda.get_device_capability(device)):
            return (
                f"it needs compute capability {self.devices}, and {torch.cuda.get_device_name(device)} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}. Use kernel='auto', or "
                "kernel='reference', which runs everywhere, but slowly"
            )
        if dtype not in (torch.bfloat16, torch.float16):
            return (
                f"it takes bfloat16 and float16, not {dtype}. Train with bf16=True (autocast), or load the model with "
                "dtype=torch.bfloat16, or use kernel='reference', which is slow"
            )
        if max(query_dim, value_dim) > 256:
            return f"it takes head dims up to 256, not {max(query_dim, value_dim)}. Use kernel='reference'"
        if scores.dropout_p:
            return (
                f"it does not report which weights a dropout of {scores.dropout_p} dropped. Set attention dropout to "
                "0, or use kernel='reference'"
            )
        return None

    def head_dims(self, query: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
        """Head dims of query and value to which these tensors are padded: the same multiple of 8, unless overridden.

        Args:
            query: `[T, H, D]`.
            value: `[K, H_kv, D_v]`.
        """
        width = multiple(max(query.shape[-1], value.shape[-1]), 8)
        return width, width

    @abstractmethod
    def varlen_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Lengths,
        window: Window,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute output `[Q, H, D_v]` and LSE `[H, Q]` of packed rows."""

    @abstractmethod
    def varlen_backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        lengths: Lengths,
        window: Window,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the gradients of packed `query`, `key` and `value`, given the LSE `[H, Q]`."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query_dim, value_dim = self.head_dims(query, value)
        calls, window = self._calls(segments, query.device), _window(segments)
        rows = calls.queries.split(query), calls.keys.split(key), calls.keys.split(value)
        outputs, lses = [], []
        for lengths, q, k, v in zip(calls.lengths, *rows):
            q, k, v = _pad(q, query_dim), _pad(k, query_dim), _pad(v, value_dim)
            parts = [
                self.varlen_forward(_heads(q, heads), _heads(k, keys), _heads(v, keys), lengths, window, scores)
                for heads, keys in self._groups(q, k, v, lengths, backward=False)
            ]
            outputs.append(_cat([output for output, _ in parts], 1))
            lses.append(_cat([lse for _, lse in parts], 0).T)
        return calls.queries.join(outputs)[..., : value.shape[-1]], calls.queries.join(lses)

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query_dim, value_dim = self.head_dims(query, value)
        calls, window = self._calls(segments, query.device), _window(segments)
        of_queries = (calls.queries.split(tensor) for tensor in (grad_output, output, lse, query))
        of_keys = (calls.keys.split(tensor) for tensor in (key, value))
        grads: list[list[torch.Tensor]] = [[], [], []]
        for lengths, grad, out, row_lse, q, k, v in zip(calls.lengths, *of_queries, *of_keys):
            grad, out, v = _pad(grad, value_dim), _pad(out, value_dim), _pad(v, value_dim)
            q, k = _pad(q, query_dim), _pad(k, query_dim)
            parts = [
                self.varlen_backward(
                    _heads(grad, heads),
                    _heads(q, heads),
                    _heads(k, keys),
                    _heads(v, keys),
                    _heads(out, heads),
                    row_lse[:, heads].T.contiguous(),
                    lengths,
                    window,
                    scores,
                )
                for heads, keys in self._groups(q, k, v, lengths, backward=True)
            ]
            for found, by_group in zip(grads, zip(*parts)):
                found.append(_cat(list(by_group), 1))
        sides = calls.queries, calls.keys, calls.keys
        grad_query, grad_key, grad_value = (side.join(found) for side, found in zip(sides, grads))
        query_dim, value_dim = query.shape[-1], value.shape[-1]
        return grad_query[..., :query_dim], grad_key[..., :query_dim], grad_value[..., :value_dim]

    def _calls(self, segments: Segments, device: torch.device) -> Calls:
        """Calls of the library. They are made once for each stream, and every layer uses them."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        place = device, stream, self.grid_of_longest
        if place not in segments.kept:
            groups = _by_length(segments) if self.grid_of_longest else [range(len(segments.queries))]
            parts = [
                Segments(
                    tuple(segments.queries[n] for n in group), tuple(segments.keys[n] for n in group), segments.band
                )
                for group in groups
            ]
            queries = _side(segments.queries, segments.query_runs, groups, device)
            keys = _side(segments.keys, segments.key_runs, groups, device)
            segments.kept[place] = Calls([_lengths(part, device) for part in parts], queries, keys)
        calls: Calls = segments.kept[place]
        return calls

    def _groups(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Lengths, backward: bool
    ) -> list[tuple[slice, slice]]:
        """Query heads and their key heads that are computed at a time.

        Raises:
            ValueError: if offsets of one key head pass 32 bits.
        """
        key_heads = most = key.shape[1]
        share = query.shape[1] // key_heads
        dim = max(query.shape[2], value.shape[2])
        width = multiple(dim, 32 if dim <= 128 else 64)  # of sums of gradients
        rows = len(query) + BLOCK * len(lengths.cu_queries)
        elements = width * max(rows * (share if self.short_offsets else 1), len(key))
        if elements > MOST_ELEMENTS:
            raise ValueError(
                f"kernel={self.name!r} cannot compute {len(query)} queries and {len(key)} keys in one call, since the "
                f"{elements} elements of one key head are beyond its 32-bit offsets. Set a larger size, or use "
                "kernel='flash_attn_3' (on Hopper) or kernel='reference'."
            )
        if self.short_offsets:
            most = min(most, MOST_ELEMENTS // elements)
        if backward and self.expands_keys and share > 1:
            expanded = len(key) * share * (key.shape[2] + value.shape[2]) * key.itemsize
            most = min(most, max(1, MOST_EXPANDED // expanded))
        most = -(-key_heads // -(-key_heads // most))  # groups of nearly equal size
        starts = range(0, key_heads, most)
        return [(slice(start * share, (start + most) * share), slice(start, start + most)) for start in starts]


def _heads(tensor: torch.Tensor, heads: slice) -> torch.Tensor:
    """Take heads of rows, copied if the rows of the tensor lie beyond 32-bit offsets."""
    part = tensor[:, heads]
    return part if len(part) * part.stride(0) <= MOST_ELEMENTS else part.contiguous()


def _cat(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _by_length(segments: Segments) -> Sequence[Sequence[int]]:
    """Group the numbers of segments by powers of 4 of their blocks, if a grid for all would be mostly empty."""
    sides = [[-(-(stop - start) // BLOCK) for start, stop in side] for side in (segments.queries, segments.keys)]
    share, blocks = max((max(side) * len(side) / sum(side), side) for side in sides)
    groups: dict[int, list[int]] = {}
    for number, count in enumerate(blocks):
        groups.setdefault((count - 1).bit_length() // 2 if share > MOST_EMPTY else 0, []).append(number)
    return list(groups.values())


def _side(
    ranges: tuple[Interval, ...], runs: tuple[Interval, ...], groups: Sequence[Sequence[int]], device: torch.device
) -> Side:
    lengths = torch.tensor([stop - start for start, stop in ranges])
    sizes = [int(lengths[list(group)].sum()) for group in groups]
    if len(groups) == 1:
        return Side(runs, sizes)
    numbers = torch.tensor([number for group in groups for number in group])
    starts, sorted_lengths = lengths.cumsum(0) - lengths, lengths[numbers]
    moved = starts[numbers] - (sorted_lengths.cumsum(0) - sorted_lengths)
    order = torch.arange(int(lengths.sum())) + moved.repeat_interleave(sorted_lengths)
    return Side(runs, sizes, to_device(order, device), to_device(order.argsort(), device))


def _lengths(segments: Segments, device: torch.device) -> Lengths:
    """Lengths of a call of the library, on the device."""
    sides = segments.queries, segments.keys
    longest_query, longest_key = (max(stop - start for start, stop in side) for side in sides)
    if segments.band not in (FULL, CAUSAL):
        # FlashAttention-2 replaces a missing right limit of a window by `max_keys`, and drops a limit of `max_keys` or
        # more (`set_params_fprop`, `mha_varlen_fwd`). Both are right only if no query range is longer.
        longest_key = max(longest_key, longest_query)
    cu_queries, cu_keys = (to_device(_cumulative(side), device) for side in sides)
    return Lengths(cu_queries, cu_keys, longest_query, longest_key)


def _cumulative(ranges: tuple[Interval, ...]) -> torch.Tensor:
    """Cumulative lengths of the ranges, beginning with 0."""
    lengths = torch.tensor([0, *(stop - start for start, stop in ranges)], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32)


def _window(segments: Segments) -> Window:
    return Window(segments.band.right == 0, *segments.band)


def multiple(number: int, of: int) -> int:
    """Smallest multiple of `of` that is no less than a number."""
    return -(-number // of) * of


def latent_dims(query: torch.Tensor, value: torch.Tensor) -> tuple[int, int] | None:
    """Head dims of multi-head latent attention, which later versions of FlashAttention take as they are, or None."""
    query_dim, value_dim = (multiple(tensor.shape[-1], 8) for tensor in (query, value))
    return (query_dim, value_dim) if 128 < query_dim <= 192 and 96 < value_dim <= 128 else None


def aligned(tensor: torch.Tensor) -> bool:
    """Return True if every row is aligned so that kernels can load 16 bytes at a time."""
    return all(start * tensor.itemsize % 16 == 0 for start in (tensor.storage_offset(), *tensor.stride()[:-1]))


def _pad(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Pad the last dimension to `width` with zeros, in memory from which kernels can load 16 bytes at a time.

    A view of packed keys/values may be unaligned if the head dim beside it is not `width`.
    """
    if tensor.shape[-1] == width and aligned(tensor):
        return tensor
    padded = tensor.new_zeros(*tensor.shape[:-1], width)
    padded[..., : tensor.shape[-1]] = tensor
    return padded
