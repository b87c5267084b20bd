"""Kernel `flash_attn_4`: FlashAttention-4, for Hopper and Blackwell, by `flash_attn.cute` of the package flash-attn-4.

The forward returns the output and the LSE `[H, Q]` first, and in later versions more. No limit of a window is None.
Each variant (head dims, heads of a key head, kind of mask) is compiled on its first call, in about 10 s. Gradients of
keys are summed for each key head.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version

from ..scores import Scores
from .varlen import Lengths, VarlenKernel, Window, latent_dims, multiple

INSTALL = "pip install 'flash-attn-4>=4.0.0b24'"
OLDEST = Version("4.0.0b5")
"""First version whose backward takes windows and packed rows on Hopper."""
SOFTCAP = Version("4.0.0b24")
"""First version whose backward takes a softcap of packed rows."""


class FlashAttn4Kernel(VarlenKernel):
    name = "flash_attn_4"
    devices = "9.0 (Hopper) or 10.x (Blackwell)"

    @staticmethod
    def runs_on(capability: tuple[int, int]) -> bool:
        return capability == (9, 0) or capability[0] == 10

    @staticmethod
    def missing() -> str | None:
        try:
            installed = _version()
        except PackageNotFoundError:
            return f"the flash-attn-4 package is not installed. Run {INSTALL}"
        if installed < OLDEST:
            return f"flash-attn-4 {installed} is older than {OLDEST}. Run {INSTALL}"
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device. On the CPU use kernel='cpu'"
        try:
            interface()
        except Exception as error:  # what it compiles with may raise anything on import
            return f"flash-attn-4 cannot be imported ({type(error).__name__}: {error}). Run {INSTALL}"
        return None

    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        if scores.softcap is not None:
            if _version() < SOFTCAP:
                return (
                    f"flash-attn-4 {_version()} has no backward with a softcap ({scores.softcap}). Run {INSTALL}, or "
                    "use kernel='reference'"
                )
            if _blackwell(device) and _dims_of_blackwell(query_dim, value_dim) == (256, 256):
                return (
                    f"it has no softcap ({scores.softcap}) for head dims {query_dim} and {value_dim} on Blackwell. "
                    "Use kernel='flash_attn', or kernel='reference'"
                )
        return super().refusal(device, dtype, query_dim, value_dim, scores)

    def head_dims(self, query: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
        if _blackwell(query.device):
            return _dims_of_blackwell(query.shape[-1], value.shape[-1])
        # On Hopper its backward for grouped heads takes equal ones alone.
        grouped = query.shape[1] != value.shape[1]
        return (None if grouped else latent_dims(query, value)) or super().head_dims(query, value)

    def varlen_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Lengths,
        window: Window,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse, *_ = interface()._flash_attn_fwd(
            query, key, value, softcap=scores.softcap, return_lse=True, **_options(lengths, window, scores)
        )
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
        grad_query, grad_key, grad_value, *_ = interface()._flash_attn_bwd(
            query,
            key,
            value,
            output,
            grad_output,
            lse,
            softcap=scores.softcap or 0.0,
            deterministic=scores.deterministic,
            **_options(lengths, window, scores),
        )
        return grad_query, grad_key, grad_value


def _options(lengths: Lengths, window: Window, scores: Scores) -> dict[str, Any]:
    return {
        "cu_seqlens_q": lengths.cu_queries,
        "cu_seqlens_k": lengths.cu_keys,
        "max_seqlen_q": lengths.max_queries,
        "max_seqlen_k": lengths.max_keys,
        "softmax_scale": scores.scale,
        "causal": window.causal,
        "window_size_left": window.left,
        "window_size_right": window.right,
    }


def interface() -> Any:
    return importlib.import_module("flash_attn.cute.interface")


def _version() -> Version:
    return Version(version("flash-attn-4"))


def _blackwell(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 10


def _dims_of_blackwell(query_dim: int, value_dim: int) -> tuple[int, int]:
    """Head dims that it takes on Blackwell and that are no less than these."""
    if max(query_dim, value_dim) <= 128:
        return (multiple(max(query_dim, value_dim), 8),) * 2
    return (192, 128) if query_dim <= 192 and value_dim <= 128 else (256, 256)
