"""Tests of the choice of a kernel."""

import importlib.util
import logging
import re
import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hf_context_parallel.attention.kernels import flash_attn_3, flash_attn_4
from hf_context_parallel.attention.kernels.registry import (
    CpuKernel,
    FlashAttn3Kernel,
    FlashAttn4Kernel,
    TorchKernel,
    check_kernel,
    choose_kernel,
    kernel_name,
)
from hf_context_parallel.attention.scores import Scores
from tests.helpers.kernels import SCALE, SHAPES, SOFTCAP, tensors


@pytest.fixture(autouse=True)
def fresh_choice():
    for cached in (choose_kernel, flash_attn_3.interface):
        cached.cache_clear()
    yield
    for cached in (choose_kernel, flash_attn_3.interface):
        cached.cache_clear()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Fixture that sets the software and hardware of the machine. By default there is none."""

    def has(flash_attn=False, cuda=False, flash_in_torch=False, capability=(8, 0), others=()):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: "cudnn" in others)
        for kernel in (FlashAttn3Kernel, FlashAttn4Kernel):
            if kernel.name in others:
                monkeypatch.setattr(kernel, "missing", staticmethod(lambda: None))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash_in_torch)
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *args: bool(flash_attn) or None if name == "flash_attn" else find_spec(name, *args),
        )
        package = ModuleType("flash_attn")
        package.__path__ = []
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        interface = "flash_attn.flash_attn_interface"
        monkeypatch.delitem(sys.modules, interface, raising=False)
        if flash_attn is True:
            monkeypatch.setitem(sys.modules, interface, ModuleType(interface))
        if flash_attn == "broken":
            (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol')")
            package.__path__ = [str(tmp_path)]

    has()
    return has


def test_a_missing_kernel_says_how_to_get_it(machine):
    with pytest.raises(ValueError, match=re.escape("pip install 'flash-attn>=2.6,<2.9'")):
        choose_kernel("flash_attn", "cuda")
    with pytest.raises(
        ValueError, match=r"kernel='torch' cannot be used: .*no CUDA device. On the CPU use kernel='cpu'"
    ):
        choose_kernel("torch", "cuda")
    machine(flash_attn=True)
    with pytest.raises(ValueError, match=r"kernel='flash_attn' cannot be used: .*no CUDA device"):
        choose_kernel("flash_attn", "cuda")
    machine(cuda=True)
    with pytest.raises(ValueError, match="Install a CUDA build of PyTorch"):
        choose_kernel("torch", "cuda")


def test_a_flash_attn_that_cannot_be_imported_is_passed_over(machine):
    """Break flash-attn as one built for another PyTorch."""
    machine(flash_attn="broken", cuda=True, flash_in_torch=True)
    assert choose_kernel("auto", "cuda").name == "torch"
    with pytest.raises(ValueError, match=r"flash-attn cannot be imported \(undefined symbol.*pip install"):
        choose_kernel("flash_attn", "cuda")


def test_flash_attn_4_alone_is_told_apart_from_a_broken_flash_attn(machine):
    """Check the remedy where only flash-attn-4 is installed, whose modules lie in the same package."""
    machine(flash_attn="only 4", cuda=True, flash_in_torch=True)
    assert choose_kernel("auto", "cuda").name == "torch"
    with pytest.raises(ValueError, match=r"flash-attn-4 is installed without flash-attn. Use kernel='flash_attn_4'"):
        choose_kernel("flash_attn", "cuda")


def test_flash_attention_3_is_taken_from_where_it_can_be_imported(machine, monkeypatch):
    machine(cuda=True)
    with pytest.raises(ValueError, match=r"FlashAttention-3 cannot be imported.*_interface.*install kernels"):
        choose_kernel("flash_attn_3", "cuda")
    asked = []
    hub = ModuleType("kernels")
    hub.get_kernel = lambda *args, **kwargs: (
        asked.append((args, kwargs)) or SimpleNamespace(flash_attn_interface="hub")
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "kernels" or None)
    monkeypatch.setitem(sys.modules, "kernels", hub)
    assert choose_kernel("flash_attn_3", "cuda").name == "flash_attn_3"
    assert flash_attn_3.interface() == "hub" and asked == [(("kernels-community/flash-attn3",), {"version": 1})]
    flash_attn_3.interface.cache_clear()
    installed = ModuleType("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", installed)
    assert flash_attn_3.interface() is installed


@pytest.mark.parametrize(
    "installed, message",
    [
        (None, r"flash-attn-4 package is not installed. Run pip install 'flash-attn-4>=4.0.0b24'"),
        ("4.0.0b4", r"flash-attn-4 4.0.0b4 is older than 4.0.0b5. Run pip install"),
        ("4.0.0b36", r"flash-attn-4 cannot be imported \(ModuleNotFoundError: .*Run pip install"),
    ],
)
def test_a_missing_flash_attention_4_says_how_to_get_it(machine, monkeypatch, installed, message):
    def version(name):
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    machine(cuda=True)
    monkeypatch.setattr(flash_attn_4, "version", version)
    with pytest.raises(ValueError, match=message):
        choose_kernel("flash_attn_4", "cuda")


def test_no_kernel_for_a_device_says_why(machine):
    with pytest.raises(
        ValueError, match=r"'flash_attn': .*pip install.*'torch': .*kernel='reference', which runs everywhere"
    ):
        choose_kernel("auto", "cuda")
    with pytest.raises(ValueError, match=r"none for device type 'mps' \(none is known for it\)"):
        choose_kernel("auto", "mps")


EVERYTHING = ("flash_attn_3", "flash_attn_4", "cudnn")


@pytest.mark.parametrize(
    "capability, flash_attn, others, chosen",
    [
        ((8, 0), True, EVERYTHING, "flash_attn"),
        ((8, 9), False, EVERYTHING, "torch"),
        ((9, 0), True, EVERYTHING, "flash_attn_3"),
        ((9, 0), True, ("flash_attn_4", "cudnn"), "flash_attn_4"),
        ((9, 0), True, ("cudnn",), "cudnn"),
        ((9, 0), True, (), "flash_attn"),
        ((9, 0), False, (), "torch"),
        ((10, 3), True, EVERYTHING, "flash_attn_4"),
        ((10, 0), True, ("flash_attn_3", "cudnn"), "cudnn"),
        ((12, 0), False, EVERYTHING, "torch"),
    ],
)
def test_auto_takes_the_best_there_is(machine, capability, flash_attn, others, chosen):
    machine(flash_attn=flash_attn, cuda=True, flash_in_torch=True, capability=capability, others=others)
    kernel = choose_kernel("auto", "cuda")
    assert kernel.name == chosen == kernel_name("auto", "cuda")  # whose rates are used
    if chosen == "cudnn":
        assert kernel.other.name == "flash_attn"
        assert kernel._counted is not None and choose_kernel("cudnn", "cuda")._counted is None
    assert choose_kernel("auto", "cpu").name == "cpu"


def test_auto_logs_its_choice_once(machine, caplog):
    with caplog.at_level(logging.INFO, "hf_context_parallel"):
        chosen = [choose_kernel("auto", "cpu") for _ in range(3)]
    assert chosen[0] is chosen[1] is chosen[2]
    assert [record.getMessage() for record in caplog.records] == [
        "context parallelism computes attention with kernel='cpu' on cpu"
    ]
    choose_kernel("reference", "cpu")  # a kernel that is asked for by name is not logged
    assert len(caplog.records) == 1


def test_a_refusal_is_an_error_that_names_the_kernel():
    query, _, value, _ = tensors(SHAPES["narrow values"], torch.float32)
    check_kernel(CpuKernel(), query, value, Scores(SCALE, SOFTCAP, 0.1))
    with pytest.raises(ValueError, match=r"kernel='torch' cannot take these tensors: it runs on CUDA"):
        check_kernel(TorchKernel(), query, value, Scores(SCALE))
