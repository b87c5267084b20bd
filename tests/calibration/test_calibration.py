"""Rates that are measured on this machine, kept, and used by all ranks alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from hf_context_parallel import ContextParallel, ContextParallelConfig
from hf_context_parallel.attention import planner
from hf_context_parallel.attention.auto_strategy import choose
from hf_context_parallel.calibration import command, measure, rates
from hf_context_parallel.calibration.measure import Sizes
from hf_context_parallel.planning.machine import CPU, H100_KERNELS, H100_NODE, machine_of

TINY = Sizes(32, 2, 1, 8, torch.float32, 16, 1024, 1024, 0.0)
MEASURED = {"forward": 1e9, "backward": 2e9, "memory": 3e9, "bandwidth": 4e9, "latency": 5e-6, "launch": 6e-6}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Keep rates in a folder of the test."""
    path = tmp_path / "cache" / "rates.json"
    monkeypatch.setattr(rates, "RATES", path)
    monkeypatch.setattr(command, "RATES", path)
    return path


def test_rates_are_those_of_the_kernel():
    cuda = torch.device("cuda")
    assert machine_of(cuda, 4) == machine_of(cuda, 4, kernel="torch")
    assert (machine_of(cuda, 4).forward, machine_of(cuda, 4).node) == (H100_KERNELS["torch"][0], 4)
    fast = machine_of(cuda, 4, kernel="cudnn")
    assert (fast.forward, fast.backward, fast.linear) == (*H100_KERNELS["cudnn"], H100_NODE.linear)
    assert fast.attention(1e12) == 1e12 / fast.forward + 2.5e12 / fast.backward
    assert machine_of(torch.device("cpu"), 2, 4).forward == CPU.forward


def on_a_rank(function: Callable[..., None], arguments: tuple) -> None:
    """Call a function that makes a process group of its own, as `torch.multiprocessing.spawn` does."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    function(rank, *arguments)


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_two_processes_are_started_to_measure_messages():
    found = measure._messages("cpu", TINY)
    assert found.keys() == {"bandwidth", "latency"} and min(found.values()) > 0


def test_what_is_measured_is_used(cache, capsys, monkeypatch, on_ranks):
    def spawn(function, arguments, nprocs):
        on_ranks(nprocs, on_a_rank, function, arguments)

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)  # new processes would import everything first
    assert command.run_calibrate("cpu", TINY) == 0
    [(key, entry)] = json.loads(cache.read_text()).items()
    assert key.endswith(f"torch {torch.__version__}, cpu") and set(entry["rates"]) == set(rates.MEASURED)
    machine = rates.machines("auto")["cpu"]
    assert {name: getattr(machine, name) for name in rates.MEASURED} == entry["rates"]
    assert machine.source == f"the rates that were calibrated on {entry['date']}"
    assert machine.node_latency == CPU.node_latency  # it was not measured
    assert rates.machines("reference")["cpu"].source == CPU.source  # rates are those of one kernel
    assert "forward, TFLOP/s" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_refused(capsys):
    assert command.run_calibrate("tpu") == 1
    assert "--device='tpu' is not one of cpu, cuda. Give one of them." in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"forward": -1.0}, {"forward": "fast"}, {"node": 3.0}, None])
def test_damaged_entries_are_left_out(cache, wrong):
    rates.keep_rates("cpu", {"cpu": MEASURED})
    assert rates.machines("cpu")["cpu"].bandwidth == 4e9
    [(key, entry)] = json.loads(cache.read_text()).items()
    cache.write_text(json.dumps({key: {**entry, "rates": wrong}}))
    assert rates.machines("cpu")["cpu"] == machine_of(torch.device("cpu"), 1)
    cache.write_text("{")
    assert rates.machines("cpu")["cpu"] == machine_of(torch.device("cpu"), 1)


def choices_with_other_rates(folder) -> tuple[list[str], str, list[str]]:
    """Choose on ranks whose caches have other rates.

    Returns:
        The strategies, the source of the rates, and what the rank would choose by its own cache.
    """
    made, alone = [], []
    size, rank = dist.get_world_size(), dist.get_rank()

    def watched(config, comm_type, layout, mask, shape, machine, free):
        mine = replace(rates.machines("cpu")["cpu"], node=machine.node, cores=machine.cores)
        alone.append(choose(config, comm_type, layout, mask, shape, mine, free).comm_type)
        made.append(choose(config, comm_type, layout, mask, shape, machine, free))
        return made[-1]

    # By the rates of rank 0 bytes cost time. By those of the others messages do.
    slow = {"bandwidth": 1e3, "latency": 1e-9} if rank == 0 else {"bandwidth": 1e12, "latency": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "RATES", folder / f"rank{rank}" / "rates.json")
        rates.keep_rates("cpu", {"cpu": MEASURED | slow})
        patch.setattr(planner, "choose", watched)
        logging.getLogger("hf_context_parallel").setLevel(logging.INFO)
        cp = ContextParallel(ContextParallelConfig(size=size, comm_type="auto"))
        x = torch.ones(1, 6, len(cp.positions(64)), 8, dtype=torch.float64)
        assert torch.allclose(cp.attention(x, x, x), x)
    return [choice.comm_type for choice in made], cp.group.machine(torch.device("cpu")).source, alone


def test_ranks_with_other_rates_choose_alike(on_ranks, tmp_path):
    (first, source, alone), *others = on_ranks(3, choices_with_other_rates, tmp_path)
    assert alone == first and source.startswith("the rates that were calibrated on")
    for found, theirs, alone in others:
        assert (found, theirs) == (first, source)
        assert alone != first  # so they would have waited for each other
