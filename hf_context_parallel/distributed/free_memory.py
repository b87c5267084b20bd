"""Memory that is free on the device of every rank of a group."""

from __future__ import annotations

import os

import psutil
import torch

from .agreement import gather_numbers
from .mesh import Ranks, world


def least_free_bytes(ranks: Ranks, device: torch.device) -> int:
    """Bytes that are free on a device, on the rank that has the fewest. All ranks must call this."""
    (free,) = gather_numbers(ranks, free_bytes(device))
    return min(free)


def memory_of(device: torch.device) -> int:
    """Bytes that this process has allocated on a device, and those that it could still allocate."""
    cuda = device.type == "cuda"
    used: int = torch.cuda.memory_allocated(device) if cuda else psutil.Process().memory_info().rss
    return used + free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can allocate on a device: what is free, and what PyTorch's allocator holds unused.

    On a CPU it is the share of this process, where the processes of a machine share its memory equally.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available: int = psutil.virtual_memory().available
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", world().size))
