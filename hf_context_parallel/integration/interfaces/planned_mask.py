"""The object that a layer gets as its attention mask on a shard."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...planning.mask import Pattern


class _NotATensor(ValueError, AttributeError):
    """Error of a layer that uses its mask as a tensor.

    It is an `AttributeError` so that `hasattr` returns False, and a `ValueError` so that any other use is refused.
    """


class PlannedMask:
    """Attention mask of a layer on a shard: the pattern that the layer passes on to our attention.

    Args:
        pattern: the keys that a token of the layer reads, apart from documents and padding.
        config: the configuration of the model.
        options: the keywords `allow_is_...` that Transformers gave for the mask.
        padding: `[B, S]`, the padding mask of the whole batch, if the mask was made outside of the decoder.
        dtype: dtype to which the layer has cast the mask, or None.
    """

    def __init__(
        self,
        pattern: Pattern,
        config: PreTrainedConfig,
        options: dict[str, Any],
        dtype: torch.dtype | None = None,
        padding: torch.Tensor | None = None,
    ):
        self.pattern = pattern
        self.rule = pattern.rule
        """Pattern without blocks, for compiled code, which would be compiled anew for the blocks of each batch."""
        self.dtype = dtype
        self.config = config
        self.options = options
        self.padding = padding
        self.ndim = 4
        """As of a mask tensor. Transformers makes no other mask where it is given one."""
        self.shape: tuple[int, ...] | None = None
        """As of the mask tensor of the shard, once the batch is known."""
        self.batch: torch.Tensor | None = None
        """Ticket of the batch, for compiled layers; see `compiled_attention`."""
        self.by_layer = False
        """True if layers with this mask may be computed by different strategies."""

    def to(self, *args: Any, **kwargs: Any) -> PlannedMask:
        """Return the mask with a dtype, for when it becomes a tensor. A device is ignored."""
        dtype = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), self.dtype)
        mask = copy.copy(self)
        mask.dtype = dtype
        return mask

    def _refuse(self, use: str):
        raise _NotATensor(
            f"{self.config.model_type!r} computes with its attention mask itself ({use}), which is no tensor on a "
            "shard. Run the model in `with cp.whole(model):`."
        )

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")

    def __getitem__(self, index):
        self._refuse("indexing")

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> None:
        mask = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, PlannedMask))
        mask._refuse(getattr(function, "__name__", str(function)))

    def _arithmetic(self, *_: Any):
        self._refuse("arithmetic")

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __invert__ = __and__ = __or__ = _arithmetic
