"""Tests of ranks that share a device, and of process groups without a backend for it."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import hf_context_parallel as hcp
from hf_context_parallel.distributed import devices
from hf_context_parallel.distributed.devices import check_backend, check_devices, refuse_shared_devices


def refusals(devices_of_ranks: list[list[str]]) -> list[str]:
    """Check the devices of some jobs, one after another, and return what each says."""
    found = []
    for uuids in devices_of_ranks:
        try:
            check_devices(uuids[torch.distributed.get_rank()])
            found.append("")
        except ValueError as refusal:
            found.append(str(refusal))
    return found


def test_two_ranks_on_one_device_are_refused_on_all_ranks(on_ranks):
    own, two, all_alike = ["a", "b", "c", "d"], ["a", "b", "c", "b"], ["a"] * 4
    for rank, found in enumerate(on_ranks(4, refusals, [own, two, own, all_alike])):
        fine, shared, again, everyone = found
        assert fine == again == ""
        assert shared.startswith(("ranks 1 and 3 use the same GPU", "ranks 3 and 1 use the same GPU"))
        assert (
            f"this rank uses {two[rank]}" in shared
            and 'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))' in shared
        )
        assert everyone.startswith("ranks ") and "use the same GPU" in everyone


def refused_by_a_context() -> str:
    """Make a `ContextParallel` over a world that looks like NCCL, on a machine where all ranks use device 0."""
    device = SimpleNamespace(uuid="GPU-7")
    with (
        patch.object(devices, "has_nccl", lambda: True),
        patch.object(torch.cuda, "current_device", lambda: 0),
        patch.object(torch.cuda, "get_device_properties", lambda index: device),
        pytest.raises(ValueError) as refusal,
    ):
        hcp.ContextParallel(hcp.ContextParallelConfig(size=2))
    return str(refusal.value)


def test_a_context_is_refused_before_a_group_is_made(on_ranks):
    for message in on_ranks(2, refused_by_a_context):
        assert "use the same GPU (this rank uses GPU-7)" in message


def test_one_process_needs_no_check():
    refuse_shared_devices()


@pytest.mark.parametrize(
    ("backends", "device", "refusal"),
    [
        ("cpu:gloo,cuda:nccl", "cuda", None),
        ("cpu:gloo,cuda:gloo", "cuda", None),
        ("cpu:mpi,cuda:mpi", "cpu", None),
        ("cpu:mpi,cuda:mpi", "cuda", "the backend 'mpi' has not been shown to carry CP's messages of CUDA tensors"),
        ("cpu:ucc,cuda:ucc", "cuda", "the backend 'ucc'"),
        ("cuda:nccl", "cpu", "the model is on cpu, and the process group has backends for cuda alone"),
        ("cpu:gloo", "cuda", "the model is on cuda, and the process group has backends for cpu alone"),
    ],
)
def test_backends_that_cannot_carry_messages_are_refused_by_name(monkeypatch, backends, device, refusal):
    monkeypatch.setattr(devices.dist, "get_backend_config", lambda group: backends)
    if refusal is None:
        check_backend(None, torch.device(device))
        return
    with pytest.raises(ValueError, match=refusal) as caught:
        check_backend(None, torch.device(device))
    assert "torch.distributed.init_process_group(" in str(caught.value)
