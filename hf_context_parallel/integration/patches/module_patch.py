"""Modules whose forward is another one for as long as a sharded batch is open."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class ModulePatch(ABC):
    """Runs modules in its own way until it is told to restore them."""

    def __init__(self) -> None:
        self._replaced: dict[torch.nn.Module, Callable | None] = {}

    @abstractmethod
    def run(self, module: torch.nn.Module, forward: Callable, turn: int, *args, **kwargs) -> Any:
        """What `module` returns while it is replaced.

        Args:
            forward: its own.
            turn: how many modules were replaced before it.
        """

    def replace(self, module: torch.nn.Module) -> None:
        """Run `module` in this way until `restore`; once is enough, however often its model is called."""
        if module in self._replaced:
            return
        before = vars(module).get("forward")  # another library's, or that of a batch which this one is nested in
        module.forward = partial(self.run, module, own_forward(module), len(self._replaced))
        self._replaced[module] = before

    def restore(self) -> None:
        for module, before in self._replaced.items():
            if before is None:
                del module.forward  # the class's shows again
            else:
                module.forward = before
        self._replaced.clear()


def own_forward(module: torch.nn.Module) -> Callable:
    """What a module computes where no batch is open: its forward, behind what replaces it."""
    forward = module.forward
    while isinstance(forward, partial) and isinstance(getattr(forward.func, "__self__", None), ModulePatch):
        forward = forward.args[1]
    return forward


def by_name(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by name."""
    signature = inspect.signature(function)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments
