"""Errors of each kernel beside those of PyTorch's attention in the same dtype, both against float32."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_context_parallel.attention.kernels.base import Kernel
from hf_context_parallel.attention.kernels.registry import KERNELS
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.tiles import CAUSAL, FULL, Segments

from .calls import Heads
from .measure import errors, kernels

OF_STOCK = 2.0
"""Largest error as a multiple of that of PyTorch's attention."""
LEAST = {torch.float32: 1e-6}
"""Errors that are not compared, since both are of rounding in float32. For other dtypes 0."""
HEADS = [Heads(32, 8, 64, 64), Heads(32, 8, 128, 128), Heads(8, 8, 256, 256), Heads(16, 16, 192, 128)]


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    small = device.type == "cpu"
    cases = [(torch.bfloat16, heads) for heads in HEADS] + [(torch.float16, HEADS[1])]
    if small:
        cases = [(torch.float32, HEADS[1])]
    for kernel in kernels(device):
        for dtype, heads in cases:
            if not kernel.refusal(device, dtype, heads.query_dim, heads.value_dim, Scores(1.0)):
                for band in (FULL, CAUSAL):
                    yield compared(kernel, dtype, heads, band, 64 if small else 2048, device)


def compared(
    kernel: Kernel, dtype: torch.dtype, heads: Heads, band: Any, tokens: int, device: torch.device
) -> dict[str, Any]:
    """Compare output and gradients of one square call with those of the reference kernel in float32."""
    torch.manual_seed(0)
    sides = (heads.query, heads.query_dim), (heads.key, heads.query_dim), (heads.key, heads.value_dim)
    inputs = [torch.randn(tokens, *side, device=device, dtype=dtype) for side in sides]
    grad = torch.randn(tokens, heads.query, heads.value_dim, device=device, dtype=dtype)
    call, scores = Segments(((0, tokens),), ((0, tokens),), band), Scores(heads.query_dim**-0.5)
    truth = computed(KERNELS["reference"](), [tensor.float() for tensor in inputs], grad.float(), call, scores)
    found = computed(kernel, inputs, grad, call, scores)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    heads_first = [tensor.transpose(0, 1)[None] for tensor in leaves]
    grouped = heads.query != heads.key
    output = scaled_dot_product_attention(*heads_first, is_causal=band == CAUSAL, enable_gqa=grouped)[0]
    stock = [output.transpose(0, 1).detach(), *torch.autograd.grad(output, leaves, grad.transpose(0, 1))]
    ratios = {}
    for name, mine, other, exact in zip(("output", "dq", "dk", "dv"), found, stock, truth):
        own, of_stock = (errors(tensor, exact) for tensor in (mine, other))
        for what in ("all", "row"):
            ratios[f"{name} {what}"] = own[what] / max(of_stock[what], LEAST.get(dtype, 1e-30))
    name = (
        f"{kernel.name}, {str(dtype)[6:]}, {'causal' if band == CAUSAL else 'full'}, {tuple(heads)}, of stock's error"
    )
    return {"what": name, "right": all(ratio <= OF_STOCK for ratio in ratios.values()), **ratios}


def computed(
    kernel: Kernel, inputs: list[torch.Tensor], grad: torch.Tensor, call: Segments, scores: Scores
) -> list[torch.Tensor]:
    """Compute output and gradients of a call."""
    output, lse = kernel.forward(*inputs, call, scores)
    output = output.to(grad.dtype)
    return [output, *kernel.backward(grad, *inputs, output, lse, call, scores)]
