"""Kernel `flash_attn_3`: FlashAttention-3, for Hopper, by `flash_attn_interface` of the folder hopper/ of flash-attn.

Where that is not installed, the package `kernels` downloads `kernels-community/flash-attn3`, which has the same
functions. Before November 2025 these were plain functions with `window_size` and arguments without defaults. Since
then they are operators with `window_size_left`, `window_size_right` and defaults, and `causal` of the backward is
`is_causal`. In all of them the LSE is the second value, `[H, Q]`, and a limit of -1 is none.

Offsets are in 32 bits only within a head (`offset_q_padded * kHeadDim`), and gradients of keys are summed for each key
head, so no call has to be cut by heads. Its scheduler starts blocks for the segments that there are.
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
from .varlen import Lengths, VarlenKernel, Window, latent_dims

HUB = "kernels-community/flash-attn3"
FREE_MULTIPROCESSORS = 0
"""Multiprocessors that are left to other kernels (`sm_margin`). NCCL's blocks have priority over ours, so they get
theirs as our blocks end. A margin would take its share also while no message travels."""


class FlashAttn3Kernel(VarlenKernel):
    name = "flash_attn_3"
    short_offsets = False
    devices = "9.0 (Hopper)"

    @staticmethod
    def runs_on(capability: tuple[int, int]) -> bool:
        return capability == (9, 0)

    @staticmethod
    def missing() -> str | None:
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device. On the CPU use kernel='cpu'"
        try:
            interface()
        except Exception as error:  # not installed, built for another torch, or not to be downloaded
            return (
                f"FlashAttention-3 cannot be imported ({type(error).__name__}: {error}). Run pip install kernels, "
                f"with which {HUB} is downloaded, or build the folder hopper/ of github.com/Dao-AILab/flash-attention"
            )
        return None

    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        if scores.deterministic and max(query_dim, value_dim) > 192:
            return (
                f"its backward is not deterministic for head dims above 192, and this one is "
                f"{max(query_dim, value_dim)}. Use kernel='torch', or leave deterministic off"
            )
        return super().refusal(device, dtype, query_dim, value_dim, scores)

    def head_dims(self, query: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
        return latent_dims(query, value) or super().head_dims(query, value)

    def varlen_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Lengths,
        window: Window,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        function = interface()._flash_attn_forward
        output, lse, *_ = _call(function, "causal", lengths, window, scores, q=query, k=key, v=value)
        return output, lse

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
        function = interface()._flash_attn_backward
        inputs = {"dout": grad_output, "q": query, "k": key, "v": value, "out": output, "softmax_lse": lse}
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        outputs = dict(zip(("dq", "dk", "dv"), grads))
        deterministic = scores.deterministic
        _call(function, "is_causal", lengths, window, scores, **inputs, **outputs, deterministic=deterministic)
        return grads


@cache
def interface() -> Any:
    """Module with the functions of FlashAttention-3, installed or downloaded.

    Raises:
        Exception: whatever the import or the download raises.
    """
    try:
        return importlib.import_module("flash_attn_interface")
    except ImportError:
        if importlib.util.find_spec("kernels") is None:
            raise
    return importlib.import_module("kernels").get_kernel(HUB, version=1).flash_attn_interface


def _call(
    function: Callable[..., Any], causal: str, lengths: Lengths, window: Window, scores: Scores, **arguments: Any
) -> Any:
    """Call a function by the names that its parameters have in this version.

    Args:
        causal: name of `causal` in versions with `window_size_left`.
    """
    parameters = _parameters(function)
    if "window_size" in parameters:
        mask: dict[str, Any] = {"causal": window.causal, "window_size": window.sizes}
    else:
        mask = {causal: window.causal, "window_size_left": window.sizes[0], "window_size_right": window.sizes[1]}
    given = {
        **arguments,
        **mask,
        "cu_seqlens_q": lengths.cu_queries,
        "cu_seqlens_k": lengths.cu_keys,
        "max_seqlen_q": lengths.max_queries,
        "max_seqlen_k": lengths.max_keys,
        "softmax_scale": scores.scale,
        "softcap": scores.softcap or 0.0,
        "sm_margin": FREE_MULTIPROCESSORS,
    }
    unused = [name for name, required in parameters.items() if required and name not in given]
    return function(**given, **dict.fromkeys(unused))


@cache
def _parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Names of the parameters, and whether they have to be given. Operators of PyTorch show none."""
    by_name = inspect.signature(function).parameters.values()
    return {p.name: p.default is p.empty for p in by_name if p.kind is p.POSITIONAL_OR_KEYWORD}
