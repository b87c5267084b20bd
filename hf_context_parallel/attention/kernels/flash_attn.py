"""Kernel `flash_attn`: varlen kernels of the flash-attn package, versions 2.6 to 2.8.

In 2.6 the forward returns eight values, the output first and the LSE sixth, and takes `window_size`. Since 2.7 it
returns four values, the LSE second, and takes `window_size_left` and `window_size_right`. In all of them the LSE is
`[H, Q]`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..scores import Scores
from .varlen import Lengths, VarlenKernel, Window


class FlashAttnKernel(VarlenKernel):
    name = "flash_attn"
    expands_keys = True
    grid_of_longest = True

    @staticmethod
    def missing() -> str | None:
        if importlib.util.find_spec("flash_attn") is None:
            return "the flash-attn package is not installed. Run pip install 'flash-attn>=2.6,<2.9'"
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device. On the CPU use kernel='cpu'"
        try:
            importlib.import_module("flash_attn.flash_attn_interface")
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn.flash_attn_interface":
                return (
                    "flash-attn-4 is installed without flash-attn. Use kernel='flash_attn_4', or run pip install "
                    "'flash-attn>=2.6,<2.9'"
                )
            return (  # built for another torch
                f"flash-attn cannot be imported ({error}). Build it for PyTorch {torch.__version__}: run pip install "
                "--no-build-isolation --no-cache-dir --force-reinstall --no-deps 'flash-attn>=2.6,<2.9'"
            )
        return None

    def varlen_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Lengths,
        window: Window,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from flash_attn import flash_attn_interface

        function = flash_attn_interface._flash_attn_varlen_forward
        results = function(
            query,
            key,
            value,
            *lengths,
            0.0,
            scores.scale,
            causal=window.causal,
            return_softmax=False,
            block_table=None,
            **_options(function, window, scores),
        )
        return results[0], results[1] if len(results) == 4 else results[5]

    def varlen_backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        lengths: Lengths,
        window: Window,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from flash_attn import flash_attn_interface

        function = flash_attn_interface._flash_attn_varlen_backward
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        function(
            grad_output,
            query,
            key,
            value,
            output,
            lse,
            *grads,
            *lengths,
            0.0,
            scores.scale,
            window.causal,
            deterministic=scores.deterministic,
            **_options(function, window, scores),
        )
        return grads


def _options(function: Callable[..., Any], window: Window, scores: Scores) -> dict[str, Any]:
    """Window, softcap and ALiBi by their names in this version. 2.6 has no defaults, so all are given."""
    if "window_size" in _parameters(function):
        sizes: dict[str, Any] = {"window_size": window.sizes}
    else:
        sizes = {"window_size_left": window.sizes[0], "window_size_right": window.sizes[1]}
    return {**sizes, "softcap": scores.softcap or 0.0, "alibi_slopes": None}


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
