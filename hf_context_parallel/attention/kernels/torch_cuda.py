"""Kernel `torch`: the CUDA flash attention of PyTorch (FlashAttention-2), which needs no other package."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from ..scores import Scores
from .varlen import VarlenKernel, Window


class TorchKernel(VarlenKernel):
    name = "torch"

    @staticmethod
    def missing() -> str | None:
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device. On the CPU use kernel='cpu'"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this PyTorch was built without flash attention. Install a CUDA build of PyTorch"
        return None

    def refusal(self, device, dtype, query_dim, value_dim, scores) -> str | None:
        if scores.softcap is not None:
            return f"it has no softcap ({scores.softcap}). Install flash-attn, or use kernel='reference'"
        return super().refusal(device, dtype, query_dim, value_dim, scores)

    def varlen_forward(self, query, key, value, lengths, window, scores):
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *lengths, 0.0, window.causal, False, **_options(window, scores)
        )
        return output, lse

    def varlen_backward(self, grad_output, query, key, value, output, lse, lengths, window, scores):
        unused = torch.empty(2, dtype=torch.uint64, device=query.device)  # the random state, since dropout is 0
        tensors = grad_output, query, key, value, output, lse
        with _determinism(scores.deterministic):
            return torch.ops.aten._flash_attention_backward(
                *tensors, *lengths, 0.0, window.causal, unused, unused, **_options(window, scores)
            )


def _options(window: Window, scores: Scores) -> dict:
    return {"scale": scores.scale, "window_size_left": window.left, "window_size_right": window.right}


@contextmanager
def _determinism(wanted: bool):
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
