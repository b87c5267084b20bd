"""Parameters that all ranks of a tensor-parallel group hold, and of whose gradient each has a share.

Transformers sums such gradients where they have been accumulated, and so sums those of earlier micro-batches again.
Here they are summed where they are made, which is right however they are accumulated and whoever shards them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..patches.module_patch import ModulePatch

SUMMED = "replicated_with_grad_allreduce"
"""The style of these modules in Transformers' plans, such as norms of heads."""


class SumGradients(torch.autograd.Function):
    """A parameter, whose gradient is summed over a group."""

    @staticmethod
    def forward(ctx, parameter: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


@contextmanager
def summed_gradients(module: torch.nn.Module, group: dist.ProcessGroup) -> Iterator[None]:
    """What a module computes meanwhile has its own parameters' gradients summed over a group."""
    parameters = dict(module.named_parameters(recurse=False))
    for name, parameter in parameters.items():
        module._parameters[name] = SumGradients.apply(parameter, group)
    try:
        yield
    finally:
        module._parameters.update(parameters)


class ReplicatedParameters(ModulePatch):
    """Sums the gradients of a model's replicated parameters in the place of Transformers, until it is told to stop.

    Args:
        group: the tensor-parallel group.
    """

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self._group = group

    def replace_all(self, styles: Mapping[torch.nn.Module, str]) -> None:
        """Replace the modules that a plan has so; see `styles_of`."""
        for module, style in styles.items():
            if style == SUMMED and "forward" in vars(module):  # before 5.20, it is a hook that sums
                self.replace(module)

    def run(self, module: torch.nn.Module, forward: Callable, turn: int, *args, **kwargs) -> Any:
        for parameter in module.parameters(recurse=False):
            hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
            if any("ReplicatedWithGradAllReduce" in getattr(hook, "__qualname__", "") for hook in hooks.values()):
                raise ValueError(
                    f"{type(module).__name__} has been trained outside of cp.shard, and Transformers would now sum "
                    "its gradients over the tensor-parallel ranks a second time. Load the model anew, and train it "
                    "inside of cp.shard only."
                )
        with summed_gradients(module, self._group):
            return type(module).forward(module, *args, **kwargs)  # without Transformers' own, which adds that hook
