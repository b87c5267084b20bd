"""Replacement of the forward of modules while a sharded batch is open."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class ModulePatch(ABC):
    """Replaces the forward of modules by its method `run`, until `restore`."""

    def __init__(self) -> None:
        self._replaced: dict[torch.nn.Module, Callable | None] = {}

    @abstractmethod
    def run(self, module: torch.nn.Module, forward: Callable, turn: int, *args: Any, **kwargs: Any) -> Any:
        """Run a replaced module.

        Args:
            forward: the forward of the module without the replacement.
            turn: number of modules that were replaced before this one.
        """

    def replace(self, module: torch.nn.Module) -> None:
        """Replace the forward of a module until `restore`. A second call for the same module does nothing."""
        if module in self._replaced:
            return
        before = vars(module).get("forward")  # of another library, or of an outer batch
        module.forward = partial(self.run, module, own_forward(module), len(self._replaced))
        self._replaced[module] = before

    def restore(self) -> None:
        """Give all modules their former forward again."""
        for module, before in self._replaced.items():
            if before is None:
                del module.forward  # so that the forward of the class is used
            else:
                module.forward = before
        self._replaced.clear()


def own_forward(module: torch.nn.Module) -> Callable:
    """Return the forward of a module without the replacements of any batch."""
    forward = module.forward
    while isinstance(forward, partial) and isinstance(getattr(forward.func, "__self__", None), ModulePatch):
        forward = forward.args[1]
    return forward


def by_name(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    signature = inspect.signature(function)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments
