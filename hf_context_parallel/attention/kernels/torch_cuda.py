"""Kernel `torch`: the CUDA flash attention of PyTorch, which needs no other package.

It is FlashAttention-2, unless `torch.nn.attention.activate_flash_attention_impl` has put another in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import current_flash_attention_impl

from ..scores import Scores
from .varlen import Lengths, VarlenKernel, Window


class TorchKernel(VarlenKernel):
    name = "torch"
    expands_keys = True
    grid_of_longest = True

    @staticmethod
    def missing() -> str | None:
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device. On the CPU use kernel='cpu'"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this PyTorch was built without flash attention. Install a CUDA build of PyTorch"
        return None

    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        if scores.softcap is not None:
            active = current_flash_attention_impl() or "FlashAttention-2"
            return (
                f"its implementation, {active} of PyTorch, has no softcap ({scores.softcap}). Install flash-attn, or "
                "use kernel='reference'"
            )
        return super().refusal(device, dtype, query_dim, value_dim, scores)

    def varlen_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: Lengths,
        window: Window,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        active = current_flash_attention_impl()
        if active == "FA4" and (window.left is not None or window.right):
            raise ValueError(
                f"kernel='torch' runs the activated implementation {active!r} of PyTorch, whose backward takes no "
                "windows. Use kernel='flash_attn_4', or call torch.nn.attention.restore_flash_attention_impl()."
            )
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *lengths, 0.0, window.causal, False, **_options(window, scores)
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
        unused = torch.empty(2, dtype=torch.uint64, device=query.device)  # the random state, since dropout is 0
        tensors = grad_output, query, key, value, output, lse
        with _determinism(scores.deterministic):
            grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
                *tensors, *lengths, 0.0, window.causal, unused, unused, **_options(window, scores)
            )
        return grads


def _options(window: Window, scores: Scores) -> dict[str, Any]:
    # An activated implementation may take a limit for a window, and `is_causal` says what a right limit of 0 does.
    right = None if window.causal else window.right
    return {"scale": scores.scale, "window_size_left": window.left, "window_size_right": right}


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Make the operator deterministic in a `with` block, if wanted.

    The operator reads only the global setting of PyTorch. If that setting only warns, the operator only warns too.
    """
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (before and not only_warns):  # setting it takes time, and changes other settings
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
