"""Registry of the kernels, and the choice among them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

import torch

from ..scores import Scores
from .base import Kernel
from .cpu import CpuKernel
from .cudnn import CudnnKernel
from .flash_attn import FlashAttnKernel
from .flash_attn_3 import FlashAttn3Kernel
from .flash_attn_4 import FlashAttn4Kernel
from .reference import ReferenceKernel
from .torch_cuda import TorchKernel

logger = logging.getLogger(__name__)

KERNELS: dict[str, type[Kernel]] = {
    kernel.name: kernel
    for kernel in (
        FlashAttn3Kernel,
        FlashAttn4Kernel,
        CudnnKernel,
        FlashAttnKernel,
        TorchKernel,
        CpuKernel,
        ReferenceKernel,
    )
}
AUTOMATIC = {
    "cpu": ("cpu",),
    "cuda": ("flash_attn", "torch"),
    "cuda 9.0": ("flash_attn_3", "flash_attn_4", "cudnn", "flash_attn", "torch"),
    "cuda 10.x": ("flash_attn_4", "cudnn", "flash_attn", "torch"),
}
"""Kernels that `auto` tries for each device type, best first. Hopper (9.0) and Blackwell (10.x) have their own."""


def named_kernel(name: str) -> Kernel:
    """Make the kernel called `name`.

    Raises:
        ValueError: if the kernel cannot be used on this machine; the message says how to get it.
    """
    missing = KERNELS[name].missing()
    if missing:
        raise ValueError(f"kernel={name!r} cannot be used: {missing}.")
    return KERNELS[name]()


def kernel_here(name: str) -> str:
    """Name of the kernel that `name` stands for on this machine, on its CUDA devices if it has any.

    Raises:
        ValueError: if the kernel cannot be used on this machine; the message says how to get it.
    """
    return choose_kernel(name, "cuda" if torch.cuda.is_available() else "cpu").name


@cache
def choose_kernel(name: str, device_type: str) -> Kernel:
    """Make the kernel called `name`, or for `"auto"` the best one that this machine has for a device type.

    The choice of `"auto"` is logged once.

    Raises:
        ValueError: if the kernel cannot be used on this machine; the message says how to get it.
    """
    if name != "auto":
        return named_kernel(name)
    reasons = []
    for candidate, missing in _automatic(device_type):
        if missing is None:
            logger.info("context parallelism computes attention with kernel=%r on %s", candidate, device_type)
            return CudnnKernel(compiles_at_once=False) if candidate == CudnnKernel.name else KERNELS[candidate]()
        reasons.append(f"{candidate!r}: {missing}")
    raise ValueError(
        f"kernel='auto' finds none for device type {device_type!r} ({'; '.join(reasons) or 'none is known for it'}). "
        "Use kernel='reference', which runs everywhere, but slowly."
    )


def _automatic(device_type: str) -> Iterator[tuple[str, str | None]]:
    """Yield the kernels that `auto` tries for the current device of a type, each with the reason why it is missing."""
    for name in AUTOMATIC.get(_generation(device_type), ()):
        yield name, KERNELS[name].missing()


def _generation(device_type: str) -> str:
    """Key of `AUTOMATIC` for the current device of a type."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return device_type
    major, minor = torch.cuda.get_device_capability()
    return "cuda 10.x" if major == 10 else "cuda 9.0" if (major, minor) == (9, 0) else "cuda"


def check_kernel(kernel: Kernel, query: torch.Tensor, value: torch.Tensor, scores: Scores) -> None:
    """Refuse tensors and scores that the kernel does not support.

    Raises:
        ValueError: if a property is not supported; the message names it and says what to do.
    """
    refusal = kernel.refusal(query.device, query.dtype, query.shape[-1], value.shape[-1], scores)
    if refusal:
        raise ValueError(f"kernel={kernel.name!r} cannot take these tensors: {refusal}.")


def kernel_name(name: str, device_type: str) -> str | None:
    """Name of the kernel that `choose_kernel` makes, or None if `"auto"` finds none."""
    if name != "auto":
        return name
    return next((candidate for candidate, missing in _automatic(device_type) if missing is None), None)
