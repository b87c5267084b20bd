"""PyTorch's own CUDA flash attention (FlashAttention-2), which needs no wheel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..scores import Scores
from .varlen import Lengths, VarlenKernel, Window


class TorchKernel(VarlenKernel):
    name = "torch"

    @staticmethod
    def missing() -> str | None:
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device; on the CPU use kernel='cpu'"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this PyTorch was built without flash attention; install a CUDA build of PyTorch"
        return None

    def refusal(
        self, device: torch.device, dtype: torch.dtype, query_dim: int, value_dim: int, scores: Scores
    ) -> str | None:
        if scores.softcap is not None:
            return f"it has no softcap ({scores.softcap}); install flash-attn, or use kernel='reference'"
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
        unused = torch.empty(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that is 0
        tensors = grad_output, query, key, value, output, lse
        with _determinism(scores.deterministic):
            grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
                *tensors, *lengths, 0.0, window.causal, unused, unused, **_options(window, scores)
            )
        return grads


def _options(window: Window, scores: Scores) -> dict[str, Any]:
    return {"scale": scores.scale, "window_size_left": window.left, "window_size_right": window.right}


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """PyTorch's global setting is the only way to ask the operator for it, which only warns where that only warns."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (before and not only_warns):  # setting it costs, and sets more than it says
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
