"""Devices of ranks: NCCL needs one for each, and a process group needs a backend for them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .mesh import has_nccl

CARRIERS = ("nccl", "gloo")
"""Backends that carry messages of CUDA tensors. Gloo does so through the host."""


def refuse_shared_devices() -> None:
    """Refuse two ranks that use one GPU, before NCCL is called. Every process of the world must call this.

    NCCL would raise "Duplicate GPU detected" on some ranks, or wait without end.

    Raises:
        ValueError: on all ranks, naming two of them.
    """
    if dist.is_initialized() and dist.get_world_size() > 1 and has_nccl():
        check_devices(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))


def check_devices(device: str) -> None:
    """Check through the store of the world that each rank has a device of its own.

    Args:
        device: identity of the device of this rank, which no other device has on any machine. The number of a device
            is none: with CUDA_VISIBLE_DEVICES each process may call its own device 0.

    Raises:
        ValueError: on all ranks, naming two of them.
    """
    store = dist.distributed_c10d._get_default_store()
    rank, size = dist.get_rank(), dist.get_world_size()
    check = (store.add("context_parallel/devices/arrived", 1) - 1) // size  # no rank leaves before all have arrived
    prefix = f"context_parallel/devices/{check}/"
    first = int(store.compare_set(f"{prefix}rank of {device}", "", str(rank)))
    if first != rank:
        store.set(f"{prefix}shared", f"{first} and {rank}")
    if store.add(f"{prefix}checked", 1) == size:
        store.set(f"{prefix}all checked", "yes")
    store.wait([f"{prefix}all checked"])
    if store.check([f"{prefix}shared"]):
        ranks = store.get(f"{prefix}shared").decode()
        raise ValueError(
            f"ranks {ranks} use the same GPU (this rank uses {device}), and NCCL needs one for each rank. "
            'Call torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) in each process before it '
            "uses its GPU, and start no more processes on a machine than it has GPUs."
        )


def check_backend(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Check that a process group can carry messages of tensors on a device.

    Raises:
        ValueError: naming the backend that cannot, or the device that has none.
    """
    backends = dict(pair.split(":") for pair in str(dist.get_backend_config(group)).split(","))
    backend = backends.get(device.type)
    if backend is None:
        raise ValueError(
            f"the model is on {device.type}, and the process group has backends for {', '.join(backends)} alone. Call "
            'torch.distributed.init_process_group("cpu:gloo,cuda:nccl").'
        )
    if device.type == "cuda" and backend not in CARRIERS:
        raise ValueError(
            f"the backend {backend!r} has not been shown to carry CP's messages of CUDA tensors. Call "
            'torch.distributed.init_process_group("nccl"), or "gloo" for several ranks on one GPU.'
        )
