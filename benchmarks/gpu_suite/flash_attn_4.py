"""Kernel `flash_attn_4` on a few shapes, since it compiles each in about 10 s. The other items leave it out."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from hf_context_parallel.attention.kernels.registry import KERNELS

from .calls import Heads, checked
from .limits import exact
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
        yield from one_call([kernel], tokens, device)
    yield from checked(kernel, CASES, device, small=False)
    yield exact(kernel, 524_416, 2, device)
