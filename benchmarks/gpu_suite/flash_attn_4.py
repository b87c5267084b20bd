"""Kernel `flash_attn_4` on a few shapes, since it compiles each in about 10 s. The other items leave it out.

Layers with a window and over packed documents are computed by FlashAttention-2 beside it, which `auto` takes for them
where FlashAttention-4 is missing. Their speeds are fractions of one causal call of FlashAttention-4.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from hf_context_parallel.attention.kernels.registry import KERNELS

from .calls import Heads, checked
from .limits import exact
from .measure import kernels
from .rings import packed_layers, ring
from .speed import one_call

CASES = [
    ("mixed", band, heads)
    for heads in (Heads(32, 8, 128, 128), Heads(16, 16, 192, 128), Heads(8, 4, 256, 256))
    for band in ("causal", "full", "both")
]


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    if options.device != "cuda":
        return
    if missing := KERNELS["flash_attn_4"].missing():
        yield {"what": missing}
        return
    kernel, device = KERNELS["flash_attn_4"](), torch.device(options.device)
    for tokens in (4096, 16_384, 65_536):
        for result in one_call([kernel], tokens, device):
            yield result
            last = result  # causal, and the longest
    plain = next(kernel for kernel in kernels(device) if kernel.name != "cudnn")
    for layer in [layer for layer in packed_layers(1) if layer.comm_type == "p2p"]:
        for each in (kernel, plain):
            yield ring(layer, each, last, device)
    yield from checked(kernel, CASES, device, small=False)
    yield exact(kernel, 524_416, 2, device)
