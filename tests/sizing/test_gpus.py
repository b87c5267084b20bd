"""Published figures of GPUs, and rates from them."""

import pytest
import torch

from hf_context_parallel.planning.machine import H100_KERNELS, Calibration
from hf_context_parallel.sizing import gpus
from hf_context_parallel.sizing.gpus import GIB, GPUS, find_gpu, rates_of


@pytest.mark.parametrize("name", ["h100-80gb", "H100", "h100", "H100-80GB"])
def test_names_of_gpus(name):
    assert find_gpu(name).name == "h100-80gb"


@pytest.mark.parametrize("name", ["a100", "h1", "tpu"])
def test_a_name_that_is_unknown_or_of_several_is_refused_with_all_names(name):
    with pytest.raises(ValueError, match=f"--gpu='{name}'.*a100-40gb, a100-80gb, h100-80gb"):
        find_gpu(name)


def test_rates_of_an_h100():
    rates = rates_of(find_gpu("h100"), node=4, network=25e9)
    machine = rates.machine
    assert (machine.forward, machine.backward) == H100_KERNELS["cudnn"]
    assert machine.linear == pytest.approx(0.6 * 989e12)
    assert machine.bandwidth == pytest.approx(0.8 * 450e9)
    assert machine.node_bandwidth == pytest.approx(0.9 * 25e9)
    assert machine.node == 4
    assert rates.host == pytest.approx(0.8 * 64e9)
    assert rates.memory == pytest.approx(0.92 * 80 * GIB)
    assert any("NVIDIA's data sheet of the H100" in line for line in rates.assumptions)


def test_without_nvlink_messages_go_over_pcie():
    assert rates_of(find_gpu("l40s")).machine.bandwidth == pytest.approx(0.8 * 32e9)


def test_every_gpu_has_rates():
    for gpu in GPUS.values():
        machine = rates_of(gpu).machine
        assert machine.backward <= machine.forward < gpu.peak
        assert gpu.source


def test_calibrated_rates_replace_published_ones_of_the_gpu_that_is_here(monkeypatch):
    monkeypatch.setattr(gpus, "gpu_here", lambda: GPUS["h100-80gb"])
    monkeypatch.setattr(gpus, "kernel_name", lambda kernel, device: "torch")
    monkeypatch.setattr(gpus, "calibration_of", lambda *_: Calibration({"linear": 7e14}, "2026-01-02"))
    found = rates_of(GPUS["h100-80gb"])
    assert found.machine.linear == 7e14
    assert "calibrated on 2026-01-02 on this machine, in place of the above: linear" in found.assumptions
    assert rates_of(GPUS["h200-141gb"]).machine.linear == pytest.approx(0.6 * 989e12)


def test_the_gpu_here_is_found_by_its_name_and_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 79 * GIB))
    assert gpus.gpu_here() == GPUS["a100-80gb"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert gpus.gpu_here() is None
