"""Stand-in for a tensor of the whole batch that is not made before it is used."""

from __future__ import annotations

import copy
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch

from ..compat import tree_leaves, tree_map

COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
"""Names of operators that compare, in the module `operator`."""
COMPUTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
"""Names of operators that Python looks up on the right operand too, as `__radd__`."""
LIKE = (torch.Tensor.to, torch.Tensor.type_as)
"""Methods that cast to the dtype, and `to` to the device, of another tensor."""


class Deferred(ABC):
    """Tensor that is made when it is used.

    A class says what it can record, or answer without the tensor. Other methods, functions and operators of tensors
    make it. Since they may write to it, a tensor that was made is used from then on. This is no `torch.Tensor`, and
    `isinstance` says so.
    """

    @cached_property
    def whole(self) -> torch.Tensor:
        """The tensor, the same on every rank. All ranks must ask for it alike."""
        return self._make()

    @property
    def is_made(self) -> bool:
        """Return whether the tensor was made."""
        return "whole" in vars(self)

    @abstractmethod
    def _make(self) -> torch.Tensor:
        """Make the tensor."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the tensor."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the tensor."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of entries."""
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return bool(self.whole)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        method = getattr(torch.Tensor, name, None)
        return partial(self._call, method) if callable(method) else getattr(self.whole, name)

    def _call(self, function: Callable, *args: Any, **options: Any) -> Any:
        """Record a method of tensors, or compute it."""
        return _computed(function, (self, *args), options)

    def _changed(self, **fields: Any) -> Any:
        """Return a copy with other fields, whose tensor is not made."""
        changed = copy.copy(self)
        vars(changed).pop("whole", None)
        vars(changed).update(fields)
        return changed

    def __getitem__(self, index: Any) -> Any:
        return self.whole[made(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.whole[made(index)] = made(value)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(function, args, kwargs or {})

    def _recorded(self, function: Callable, args: tuple, options: dict[str, Any]) -> Any:
        """Record a function of tensors, this one among them. Return its result, or None if it is to be computed."""
        return None


def _operator(name: str, is_right: bool = False) -> Callable:
    function = getattr(operator, name)

    def apply(self: Deferred, *others: Any) -> Any:
        return _computed(function, (*others, self) if is_right else (self, *others), {})

    return apply


def _computed(function: Callable, args: tuple, options: dict[str, Any]) -> Any:
    """Record a function of tensors that are deferred, or compute it."""
    if function in LIKE and len(args) > 1 and isinstance(args[1], Deferred):
        function, args = torch.Tensor.to, (args[0], args[1].device, args[1].dtype, *args[2:])
        if not isinstance(args[0], Deferred):
            return function(*args, **options)
    listed = (x for value in args if isinstance(value, (list, tuple)) for x in value)
    for x in (*args, *listed):
        result = x._recorded(function, args, options) if isinstance(x, Deferred) else None
        if result is not None:
            return result
    return function(*made(args), **made(options))


for _name in ("neg", "abs", *COMPARED, *COMPUTED):
    setattr(Deferred, f"__{_name}__", _operator(_name))
for _name in COMPUTED:
    setattr(Deferred, f"__r{_name}__", _operator(_name, is_right=True))
Deferred.__hash__ = object.__hash__  # type: ignore[method-assign]  # __eq__ is that of tensors


def made(tree: Any) -> Any:
    """Replace the deferred tensors in nested containers by those that they stand for."""
    if not has_deferred(tree):  # some outputs of models cannot be made anew
        return tree
    return tree_map(lambda x: x.whole if isinstance(x, Deferred) else x, tree)


def has_deferred(tree: Any) -> bool:
    """Return whether there is a deferred tensor in nested containers."""
    return any(isinstance(x, Deferred) for x in tree_leaves(tree))
