"""What a layer gets as its attention mask on a shard."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from ...planning.mask import Pattern


class _NotATensor(ValueError, AttributeError):
    """Both, so that `hasattr` says no and everything else stops with the message."""


class PlannedMask:
    """What a layer gets as its attention mask on a shard, and hands to our attention: the pattern that it wants."""

    def __init__(
        self, pattern: Pattern, config: PreTrainedConfig, options: dict[str, Any], dtype: torch.dtype | None = None
    ):
        self.pattern = pattern
        self.dtype = dtype
        self.config = config
        self.options = options

    def to(self, *args, **kwargs) -> PlannedMask:
        """Itself, to be in another dtype when it is a tensor."""
        dtype = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), self.dtype)
        return PlannedMask(self.pattern, self.config, self.options, dtype)

    def _refuse(self, use: str):
        raise _NotATensor(
            f"{self.config.model_type!r} computes with its attention mask itself ({use}), which on a shard is a plan "
            "and no matrix. Call the model outside cp.shard."
        )

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")

    def __getitem__(self, index):
        self._refuse("indexing")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        mask = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, PlannedMask))
        mask._refuse(getattr(function, "__name__", str(function)))

    def _arithmetic(self, *_):
        self._refuse("arithmetic")

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __invert__ = __and__ = __or__ = _arithmetic
