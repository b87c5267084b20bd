"""PyTorch's own CUDA flash attention (FlashAttention-2), which needs no wheel."""

from __future__ import annotations

import torch

from .varlen import VarlenKernel


class TorchKernel(VarlenKernel):
    name = "torch"

    @staticmethod
    def missing() -> str | None:
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device; on the CPU use kernel='cpu'"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this PyTorch was built without flash attention; install a CUDA build of PyTorch"
        return None

    def varlen_forward(self, query, key, value, lengths, causal, scale):
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *lengths, 0.0, causal, False, scale=scale
        )
        return output, lse

    def varlen_backward(self, grad_output, query, key, value, output, lse, lengths, causal, scale):
        unused = torch.empty(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that is 0
        return torch.ops.aten._flash_attention_backward(
            grad_output, query, key, value, output, lse, *lengths, 0.0, causal, unused, unused, scale=scale
        )
