"""A pretended device: tensors on the CPU that the host may not read, to find where a step would wait for a device."""

from __future__ import annotations

import traceback
from contextlib import ExitStack

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_context_parallel.distributed import host

OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}
"""Operators for whose result, or its shape, the host waits."""
METHODS = {getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu", "__array__")}
"""Methods that read a tensor of the CPU without an operator."""


class PretendedDevice(ExitStack):
    """Block in which chosen tensors, and all that is computed of them, lie on a pretended device.

    Attributes:
        reads: names of the operators by which the host read such tensors, each with the function of this package, or
            else of Transformers, that called it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, str]] = []
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address comes again

    def put(self, *tensors: torch.Tensor) -> None:
        """Let tensors lie on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage

    def has(self, *values: object) -> bool:
        """Return whether any tensor among these values lies on the device."""
        tensors = [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]
        return any(x.numel() and self._lies_here(x.untyped_storage().data_ptr()) for x in tensors)

    def _lies_here(self, address: int) -> bool:
        found = self._storages.get(address)
        return found is not None and found.data_ptr() == address  # else it has given up its memory, as landings do

    def note(self, name: str) -> None:
        """Take note of a read."""
        frames = [frame for frame in traceback.extract_stack() if "site-packages/torch/" not in frame.filename]
        ours = [f for f in frames if "/hf_context_parallel/" in f.filename or "/transformers/" in f.filename]
        self.reads.append((name, (ours or frames)[-1].name))

    def __enter__(self) -> PretendedDevice:
        super().__enter__()
        patch = self.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(host, "is_on_host", lambda tensor: not self.has(tensor))
        patch.setattr(host, "to_device", lambda source, device: self.moved({"": source})[""])
        self.enter_context(_Functions(self))
        self.enter_context(_Operators(self))
        return self

    def moved(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move a batch to the device, as a loader does."""
        found = {name: tensor.clone() for name, tensor in batch.items()}
        self.put(*found.values())
        for name, tensor in found.items():
            host.remember(tensor, batch[name])
        return found


class _Functions(TorchFunctionMode):
    def __init__(self, device: PretendedDevice):
        super().__init__()
        self._device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in METHODS and self._device.has(args[:1]):
            self._device.note(function.__name__)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, device: PretendedDevice):
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, on_device = function.overloadpacket.__name__, self._device.has(args, kwargs or {})
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_boolean = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices)
        if on_device and (name in OPERATORS or by_boolean):
            self._device.note(name)
        result = function(*args, **(kwargs or {}))
        if on_device or name == "set_":  # a message that arrived lies where its sender has it
            self._device.put(*(x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)))
        return result
