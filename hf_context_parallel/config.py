"""What a user can ask for, validated where it is written."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

COMM_TYPES = ("p2p",)
LAYOUTS = ("zigzag", "contiguous")
KERNELS = ("auto", "cpu", "torch", "flash_attn", "reference")


@dataclass(frozen=True)
class ContextParallelConfig:
    """How the sequence is split over the ranks of a context-parallel (CP) group, and how keys travel.

    Args:
        size: ranks in a CP group. Each holds 1/size of every sequence. It must divide the world size.
        comm_type: how keys and values reach the queries. `"p2p"`: ring attention, one step a rank.
        layout: which tokens a rank holds. `"zigzag"`: chunks r and 2 * size - 1 - r of 2 * size, so that every
            rank has the same share of a causal mask. `"contiguous"`: chunk r of size.
        kernel: what computes attention on one rank. `"auto"` takes the best that is present: `"flash_attn"` (the
            flash-attn package), `"torch"` (PyTorch's own CUDA flash attention) or `"cpu"` (PyTorch's CPU flash
            attention). `"reference"` is plain PyTorch, for any dtype and device, and keeps a matrix of scores.
        check_batch: compare a checksum of each batch between the ranks of a CP group before the model runs. The
            local checks and the exchange of their outcome stay on when it is off.
        verify: before the first step, the Trainer compares the model on shards with the model on whole sequences, and
            stops where a layer differs by more than rounding does; see `verify`. It costs less than two steps.

    Raises:
        ValueError: if a value is out of range or not among those listed.
    """

    size: int = 1
    comm_type: str = "p2p"
    layout: str = "zigzag"
    kernel: str = "auto"
    check_batch: bool = True
    verify: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size={self.size!r}: the number of ranks in a CP group must be an integer of 1 or more.")
        for field, allowed in (("comm_type", COMM_TYPES), ("layout", LAYOUTS), ("kernel", KERNELS)):
            value = getattr(self, field)
            if value not in allowed:
                nearest = difflib.get_close_matches(str(value), allowed, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"{field}={value!r} is not one of {', '.join(map(repr, allowed))}.{hint}")
        for field in ("check_batch", "verify"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}={getattr(self, field)!r} must be true or false.")
