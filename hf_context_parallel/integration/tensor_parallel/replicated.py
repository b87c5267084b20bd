"""Replicated parameters: all ranks of a tensor-parallel group hold them, and each computes a part of their gradients.

Transformers sums such a gradient after it has been accumulated, and so sums the gradients of earlier micro-batches
again. Here each gradient is summed in backward, before it is accumulated. That is right for any accumulation, and
whether or not FSDP shards the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ...compat import sums_after_accumulation
from ..active_batch import active_batch
from ..patches.module_patch import ModulePatch

SUMMED = "replicated_with_grad_allreduce"
"""The style of modules with replicated parameters in the plans of Transformers, such as norms of queries and keys."""


class SumGradients(torch.autograd.Function):
    """Identity of a parameter. Backward sums the gradient over a group."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


@contextmanager
def summed_gradients(module: torch.nn.Module, group: dist.ProcessGroup) -> Iterator[None]:
    """Sum the gradients of the parameters of a module itself over a group, for calls inside this block."""
    parameters = dict(module.named_parameters(recurse=False))
    for name, parameter in parameters.items():
        module._parameters[name] = SumGradients.apply(parameter, group)
    try:
        yield
    finally:
        module._parameters.update(parameters)


class ReplicatedParameters(ModulePatch):
    """Sums the gradients of replicated parameters in the place of Transformers, while a batch is active.

    Args:
        group: the tensor-parallel group.
    """

    always = False
    """True to sum without an active batch too."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self._group = group

    def replace_all(self, styles: Mapping[torch.nn.Module, str]) -> None:
        """Replace the modules whose style in the plan is `SUMMED`; see `styles_of`."""
        for module, style in styles.items():
            if style == SUMMED and "forward" in vars(module):  # before 5.20 a hook sums
                self.replace(module)

    def run(self, module: torch.nn.Module, forward: Callable, turn: int, *args: Any, **kwargs: Any) -> Any:
        if active_batch() is None and not self.always:
            return forward(*args, **kwargs)
        for parameter in module.parameters(recurse=False):
            hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
            if any(map(sums_after_accumulation, hooks.values())):
                raise ValueError(
                    f"{type(module).__name__} has been trained on whole sequences, and Transformers would now sum "
                    "its gradients over the tensor-parallel ranks a second time. Load the model again, and train it "
                    "on shards only."
                )
        # Transformers has put a forward on the instance, which adds that hook. So the forward of the class is called.
        with summed_gradients(module, self._group):
            return type(module).forward(module, *args, **kwargs)


class AlwaysReplicated(ReplicatedParameters):
    """Sums the gradients of replicated parameters, with and without a batch, until `restore`."""

    always = True
