"""Facts about the machine: versions, and the rates of its memory and its matrix products."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from .. import report
from .measure import DTYPES, median_ms

MODULES = ("triton", "flash_attn", "flash_attn_interface", "flash_attn.cute", "kernels")


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    present = [name for name in MODULES if _found(name)]
    yield {"what": "versions", **report.machine(), "transformers": transformers.__version__, "present": present}
    device = torch.device(options.device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info()
        yield {
            "what": "device",
            "CUDA": torch.version.cuda,
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "cuDNN": torch.backends.cudnn.version(),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "free GiB": free / 2**30,
            "GiB": total / 2**30,
            "flash attention": torch.backends.cuda.is_flash_attention_available(),
        }
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield {"what": "copy", "TB/s read and written": 2 * size / median_ms(lambda: target.copy_(source), device) / 1e9}
    side = 8192 if device.type == "cuda" else 512
    matrix = torch.randn(side, side, dtype=DTYPES[device.type], device=device)
    yield {"what": "matrix product", "TFLOP/s": 2 * side**3 / median_ms(lambda: matrix @ matrix, device) / 1e9}


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that contains the module is missing
        return False
