"""Tiles that are computed again without rounding."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial

from torch.utils.checkpoint import checkpoint

from hf_context_parallel.integration import tiles
from hf_context_parallel.verification.types.check import Unrounded

CONTEXTS = {"context_fn": lambda: (nullcontext(), Unrounded())}
"""Keywords of a checkpoint that is computed again without rounding. PyTorch enters no mode again by itself."""


@contextmanager
def unrounded_tiles():
    """Compute in float64, where models ask for float32, in forward and in tiles that are computed again."""
    tiles.checkpoint = partial(checkpoint, **CONTEXTS)
    try:
        with Unrounded():
            yield
    finally:
        tiles.checkpoint = checkpoint
