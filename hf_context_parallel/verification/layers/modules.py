"""Run of a single module: its hidden states among its arguments, its output, and the gradient of its input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ...compat import tree_leaves, tree_map
from ...integration.interfaces.stock_attention import stock_attention
from ...integration.patches.module_patch import ModulePatch
from ...integration.switches import report_stock_attn_name

INPUT, OUTPUT, GRADIENT = "input", "output", "input gradient"


@contextmanager
def stock_forwards(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Let modules read the name of Transformers' own attention in their configuration, as on a shard.

    Some modules that see whole sequences ask for the name. For all others it stays `context_parallel`, so that calls
    of attention are observed.
    """
    replacement = _StockForwards()
    try:
        for module in modules:
            replacement.replace(module)
        with report_stock_attn_name():
            yield
    finally:
        replacement.restore()


class _StockForwards(ModulePatch):
    def run(self, module: torch.nn.Module, forward: Callable, turn: int, *args: Any, **kwargs: Any) -> Any:
        with stock_attention(module):
            return forward(*args, **kwargs)


def run_alone(
    module: torch.nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    hidden: int | str | None,
    shape: tuple[int, int],
    weigh: Callable[[torch.Tensor], torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Run a module alone, without its hooks, and return its output and the gradient of its hidden states.

    Hooks are not needed, since they have already gathered its parameters and prepared its inputs.

    Args:
        module: the module.
        args, kwargs: its arguments.
        hidden: index or name of the argument that holds the hidden states, or None.
        shape: rows and tokens of its output.
        weigh: a function of the output that returns the gradient of the output. Without it, no gradient is computed.

    Returns:
        The tensors by name, `OUTPUT` and `GRADIENT`, as far as there are any.
    """
    args, kwargs = tree_map(_detached, (args, kwargs))
    leaf = None
    if hidden is not None and weigh is not None:
        leaf = take(args, kwargs, hidden).requires_grad_()
    with nullcontext() if leaf is None else torch.enable_grad():
        if hidden is not None:  # a copy: modules may write into it
            args, kwargs = replaced(args, kwargs, hidden, take(args, kwargs, hidden).clone())
        output = hidden_output(module.forward(*args, **kwargs), shape)
    if output is None:
        return {}
    result = {OUTPUT: output.detach()}
    if leaf is not None and output.requires_grad:
        (gradient,) = torch.autograd.grad(output, leaf, weigh(output), allow_unused=True)
        result |= {} if gradient is None else {GRADIENT: gradient}
    return result


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def hidden_states(args: tuple, kwargs: dict[str, Any], shape: tuple[int, int]) -> int | str | None:
    """Find the argument that holds the hidden states, by its index or name.

    It is the argument called `hidden_states`, or the first tensor `[B, S, ...]`. None if there is none.
    """
    if _is_hidden(kwargs.get("hidden_states"), shape):
        return "hidden_states"
    places = (*enumerate(args), *kwargs.items())
    return next((place for place, value in places if _is_hidden(value, shape)), None)


def _is_hidden(value: Any, shape: tuple[int, int]) -> bool:
    is_tensor = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    return is_tensor and value.is_floating_point() and value.dim() >= 3 and tuple(value.shape[:2]) == shape


def hidden_output(output: Any, shape: tuple[int, int]) -> torch.Tensor | None:
    """Return the first of a module's outputs that is `[B, S, ...]`, or None."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return next((leaf for leaf in leaves if _is_hidden(leaf, shape)), None)


def take(args: tuple, kwargs: dict[str, Any], place: int | str) -> torch.Tensor:
    return args[place] if isinstance(place, int) else kwargs[place]


def replaced(args: tuple, kwargs: dict[str, Any], place: int | str, value: torch.Tensor) -> tuple[tuple, dict]:
    """Return the arguments with another value in one place."""
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: value}
