"""Modules' forwards, replaced for as long as a sharded batch is open.

A hook would not do where a module is called more than once for a call of its own. What is replaced is the attribute of
the instance, which both `nn.Module` and FSDP look up in every call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Replacements:
    """Forwards that stand for those of modules until `restore`."""

    def __init__(self):
        self._before: list[tuple[torch.nn.Module, Callable | None]] = []

    def replace(self, module: torch.nn.Module, make: Callable[[torch.nn.Module, Callable], Callable]) -> None:
        """Let `make(module, forward)` stand for the module's forward, made from the one it had without us."""
        before = vars(module).get("forward")  # another library's, or that of a batch which this one is nested in
        ours = make(module, getattr(before, "replaced", None) or module.forward)
        ours.replaced = getattr(before, "replaced", None) or module.forward
        module.forward = ours
        self._before.append((module, before))

    def restore(self) -> None:
        for module, before in reversed(self._before):
            if before is None:
                del module.forward  # the class's shows again
            else:
                module.forward = before
        self._before.clear()
