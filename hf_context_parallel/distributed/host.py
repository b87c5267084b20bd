"""Tensors on the host and on a device: copies that hold up nobody, and values that the host knows already.

A copy from a device to the host waits until the device has done all that was queued before. So the host remembers the
tensors that it has sent to a device, such as those of a batch, and reads them where they came from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch.nn.functional import pad

Value = TypeVar("Value")


class ByTensor(Generic[Value]):
    """Values by tensors themselves, not by what they hold. It goes with its tensor, and is void once that is written.

    Inference tensors have no version, so they get no value.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[torch.Tensor], int, Value]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, tensor: torch.Tensor, value: Value) -> None:
        """Keep the value of a tensor."""
        if tensor.is_inference():
            return
        key = id(tensor)
        reference = weakref.ref(tensor, lambda _: self._kept.pop(key, None))
        self._kept[key] = reference, tensor._version, value

    def get(self, tensor: torch.Tensor) -> Value | None:
        """Return the value of a tensor that was not written since then, or None."""
        reference, version, value = self._kept.get(id(tensor), (None, None, None))
        if reference is None or reference() is not tensor or tensor._version != version:
            return None
        return value


_known: ByTensor[tuple[torch.Tensor, int]] = ByTensor()
"""Tensor on the host that a tensor on a device was copied from, and its version then."""


def to_device(source: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to a device. For a copy to CUDA nobody waits."""
    return source.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else source.to(device)


def beside(source: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Copy a tensor of the host to where another one is. A tensor that is there already is returned as it is."""
    return source if is_on_host(like) or source.device == like.device else to_device(source, like.device)


def is_on_host(tensor: torch.Tensor) -> bool:
    """Return whether the host can read a tensor without a wait for a device."""
    return tensor.is_cpu


def remember(tensor: torch.Tensor, source: torch.Tensor) -> None:
    """Remember the tensor of the host that a tensor was copied from."""
    if not is_on_host(tensor) and is_on_host(source) and not source.is_inference():
        _known.put(tensor, (source, source._version))


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a tensor on the host.

    They are not copied if it is on the host, or is remembered and neither of the two tensors was written since then.
    """
    found = at_hand(tensor)
    return tensor.detach().cpu() if found is None else found


def at_hand(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the values of a tensor that the host has without a wait, or None."""
    if is_on_host(tensor):
        return tensor.detach() if tensor.requires_grad else tensor
    source, version = _known.get(tensor) or (None, 0)
    return source if source is not None and source._version == version else None


METHODS = ("to", "contiguous", "__getitem__", "view", "reshape", "flatten")
FOLLOWED = {pad, *(getattr(torch.Tensor, name) for name in METHODS)}
"""Functions of a `Twin` that are computed on the host too."""


def values_of(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of a tensor on the host, without a wait if it is a twin, and the plain tensor."""
    if not isinstance(tensor, Twin):
        return on_host(tensor), tensor
    with torch._C.DisableTorchFunctionSubclass():
        plain = tensor.as_subclass(torch.Tensor)
    return tensor._host if tensor._at == tensor._version else on_host(plain), plain


class Twin(torch.Tensor):
    """Tensor whose values the host follows, through functions that move and cut it.

    The loss of a model shifts labels before it uses them. So the host knows the targets without a wait.
    """

    _host: torch.Tensor
    _at: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> torch.Tensor:
        """Make a twin of a tensor on a device whose values the host has. Others are returned as they are."""
        host = None if is_on_host(tensor) else at_hand(tensor)
        return tensor if host is None else cls._made(tensor, host)

    @classmethod
    def _made(cls, tensor: torch.Tensor, host: torch.Tensor) -> Twin:
        made = tensor.as_subclass(cls)
        made._host, made._at = host, made._version
        return made

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            first, *others = args or (None,)
            alone = not any(isinstance(x, torch.Tensor) for x in (*others, *kwargs.values()))
            if function not in FOLLOWED or not isinstance(first, Twin) or not alone or first._at != first._version:
                return result
            if function is not torch.Tensor.to:
                return cls._made(result, function(first._host, *others, **kwargs))
            return cls._made(result, first._host) if result.dtype == first.dtype else result
