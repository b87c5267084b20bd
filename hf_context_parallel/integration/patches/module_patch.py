"""Replacement of the forward of modules. It is installed once, and depends on the active batch."""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial, update_wrapper
from typing import Any

import torch

from ...compat import is_in_backward
from ..active_batch import active_batch

ran_sharded: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Modules whose last forward ran on a shard. Gradient checkpointing must recompute them on that shard."""


KEEP_VALUES = ("torch.distributed.", "trl.models.activation_offloading")
"""Beginnings of the names of Python modules whose hooks neither read nor change values: those of FSDP, and those by
which TRL leaves on the device what the head saves."""
FOR_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")
"""Names of hooks that do no more than to ask for the gradient of an output: that of Transformers, with which gradient
checkpointing begins, and those of PEFT and of scripts that were written like it."""


OF_EMBEDDINGS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""Packages whose embeddings, and wrappers around them, take each id by itself."""


class ModulePatch(ABC):
    """Replaces the forward of modules by its method `run`."""

    def __init__(self) -> None:
        self._replaced: weakref.WeakKeyDictionary[torch.nn.Module, Callable | None] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict) -> ModulePatch:
        """Return this patch itself: a copy of a model is patched like the model."""
        return self

    @abstractmethod
    def run(self, module: torch.nn.Module, forward: Callable, turn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a replaced module.

        Args:
            forward: the forward of the module without the replacement.
            turn: number of modules that were replaced before this one, or what `replace` was given.
        """

    def replace(self, module: torch.nn.Module, turn: Any = None) -> None:
        """Replace the forward of a module. Nothing happens if a patch of the same class has replaced it."""
        if patch_of(module, type(self)) is not None:
            return
        before = vars(module).get("forward")  # of another library, or of another patch
        forward = module.forward
        turn = len(self._replaced) if turn is None else turn
        # The wrapper shows the signature of the forward, which the Trainer reads.
        module.forward = update_wrapper(partial(self.run, module, forward, turn), forward)
        self._replaced[module] = before

    def restore(self) -> None:
        """Give all modules their former forward again."""
        for module, before in list(self._replaced.items()):
            if before is None:
                del module.forward  # so that the forward of the class is used
            else:
                module.forward = before
        self._replaced.clear()


class BatchPatch(ModulePatch):
    """Runs modules by a part of the active batch, and without a batch as Transformers wrote them.

    Args:
        part: the class of the part, whose method `run` has the arguments of `ModulePatch.run`.
    """

    part: type[Any]

    @torch.compiler.disable
    def run(self, module: torch.nn.Module, forward: Callable, turn: Any, *args: Any, **kwargs: Any) -> Any:
        batch = active_batch()
        if batch is None:
            refuse_recomputation(module)
            return forward(*args, **kwargs)
        ran_sharded.add(module)
        return batch.part(self.part).run(module, forward, turn, *args, **kwargs)


def refuse_recomputation(module: torch.nn.Module) -> None:
    """Refuse to recompute a module without its batch, if its last forward ran on a shard.

    Raises:
        RuntimeError: in backward.
    """
    if not is_in_backward():
        ran_sharded.discard(module)
    elif module in ran_sharded:
        raise RuntimeError(
            f"a {type(module).__name__} of a sharded batch is recomputed in backward, by gradient checkpointing that "
            "does not carry the batch. Switch checkpointing on by model.gradient_checkpointing_enable(), or call "
            "torch.utils.checkpoint on the whole model."
        )


def _forwards(module: torch.nn.Module) -> Iterator[Callable]:
    """List the forward of a module, and the one inside each wrapper of it."""
    forward = module.forward
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _patch(forward: Callable) -> ModulePatch | None:
    """Return the patch that made a forward, or None."""
    patch = getattr(forward.func, "__self__", None) if isinstance(forward, partial) else None
    return patch if isinstance(patch, ModulePatch) else None


def patch_of(module: torch.nn.Module, kind: type[ModulePatch]) -> Any:
    """Return the patch of a class that has replaced the forward of a module, or None."""
    patches = (_patch(forward) for forward in _forwards(module))
    return next((patch for patch in patches if type(patch) is kind), None)


def inside_patches(forward: Callable) -> Callable:
    """Return a forward without the patches of this package around it."""
    while _patch(forward) is not None:
        forward = forward.args[1]  # type: ignore[attr-defined]
    return forward


def has_hooks(module: torch.nn.Module) -> bool:
    """Return whether a module has hooks on its forward that may read or change values.

    Those of `KEEP_VALUES` and of `FOR_GRADIENTS` do not.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(
        getattr(hook, "__module__", "").startswith(KEEP_VALUES) or getattr(hook, "__name__", "") in FOR_GRADIENTS
        for hook in hooks
    )


def acts_by_token(embeddings: torch.nn.Module) -> bool:
    """Return whether embeddings take each id by itself: their library is known, and no hook changes them."""
    forward = inside_patches(embeddings.forward)
    function = forward.func if isinstance(forward, partial) else getattr(forward, "__func__", forward)
    return function.__module__.split(".")[0] in OF_EMBEDDINGS and not has_hooks(embeddings)


def by_name(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    signature = inspect.signature(function)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments
