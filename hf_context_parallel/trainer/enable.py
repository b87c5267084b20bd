"""`enable_accelerate`: accelerate's own switch for context parallelism (`cp_size`) switches this package on.

Accelerate and the Trainer have no hook for other implementations, so methods of theirs are replaced, once. They do
what they did where the switch is off or the model has another attention.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from accelerate import Accelerator, ParallelismConfig
from transformers import Trainer

from ..config import ContextParallelConfig
from ..context_parallel import ContextParallel
from ..data.accelerator import share_groups
from ..integration.border.parallelize import has_our_attention, parallelize
from ..integration.model_registry import NAME
from .accelerate import CP_SIZE, ENABLED, AnyDeviceParallelism
from .mixin import ContextParallelMixin

BACKEND = "hf_context_parallel"
"""Name of this package as accelerate's `cp_backend`."""


@functools.cache
def enable_accelerate() -> None:
    """Let accelerate's `cp_size` mean context parallelism by this package. Call it once, before a Trainer is made.

    A Trainer of any class gets `ContextParallelMixin` if `cp_size` is more than 1 and its model was loaded with
    `attn_implementation="context_parallel"`. An Accelerator prepares models by `parallelize`, and loaders that deal
    samples to CP groups, if its `ParallelismConfig` has `cp_backend="hf_context_parallel"`. Others stay as they are.
    """
    _accept_backend()
    Trainer.__new__ = staticmethod(_new_trainer)
    _prepare_models()


def _accept_backend() -> None:
    """Let `ParallelismConfig` take our name, on any device."""
    check, validate = ParallelismConfig.__post_init__, ParallelismConfig._validate_accelerator

    @functools.wraps(check)
    def check_others(self: ParallelismConfig) -> None:
        ours = (self.cp_backend or os.environ.get("PARALLELISM_CONFIG_CP_BACKEND")) == BACKEND
        self.cp_backend = "torch" if ours else self.cp_backend
        check(self)
        self.cp_backend = BACKEND if ours else self.cp_backend

    @functools.wraps(validate)
    def validate_others(self: ParallelismConfig, accelerator: Accelerator) -> None:
        if self.cp_backend == BACKEND and not isinstance(self, AnyDeviceParallelism):
            AnyDeviceParallelism.of(self, None)._validate_accelerator(accelerator)
        else:
            validate(self, accelerator)

    ParallelismConfig.__post_init__, ParallelismConfig._validate_accelerator = check_others, validate_others


def _prepare_models() -> None:
    """Let Accelerators with our backend prepare models and loaders for CP groups."""
    prepare = Accelerator.prepare

    @functools.wraps(prepare)
    def prepare_ours(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        settings = self.parallelism_config
        if settings is None or settings.cp_backend != BACKEND or settings.cp_size == 1:
            return prepare(self, *args, **kwargs)
        if not hasattr(self, "cp"):
            share_groups(self, ContextParallel(ContextParallelConfig(size=settings.cp_size), self.torch_device_mesh))
            self.parallelizes = True
        prepared = prepare(self, *args, **kwargs)
        for item in prepared if isinstance(prepared, tuple) else [prepared]:
            if isinstance(item, torch.nn.Module) and getattr(self, "parallelizes", False):
                parallelize(item, self.cp)
        return prepared

    Accelerator.prepare = prepare_ours


def _new_trainer(cls: type[Trainer], *args: Any, **kwargs: Any) -> Trainer:
    """Make a Trainer, of a class with the mixin if accelerate's switch is on and the model has our attention."""
    model = kwargs.get("model", args[0] if args else None)
    arguments = kwargs.get("args", args[1] if len(args) > 1 else None)
    if not issubclass(cls, ContextParallelMixin) and _is_on(arguments) and _is_ours(model, arguments):
        cls = _mixed(cls)
    return object.__new__(cls)


@functools.cache
def _mixed(cls: type[Trainer]) -> type[Trainer]:
    return type(cls.__name__, (ContextParallelMixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _is_on(arguments: Any) -> bool:
    """Return whether accelerate is asked for a CP size of more than 1, by these arguments or its launcher."""
    settings = getattr(arguments, "parallelism_config", None)
    if settings is not None:
        return bool(settings.cp_size > 1)
    return os.environ.get(ENABLED, "false").lower() == "true" and os.environ.get(CP_SIZE.upper(), "1") != "1"


def _is_ours(model: Any, arguments: Any) -> bool:
    """Return whether a model, or a name with arguments for loading it, has our attention."""
    if isinstance(model, torch.nn.Module):
        return has_our_attention(model)
    return (getattr(arguments, "model_init_kwargs", None) or {}).get("attn_implementation") == NAME
