"""Environment of the processes that a recipe runs in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hf_context_parallel.distributed.last_words import CAUSE
from hf_context_parallel.recipe import launch, launcher


@pytest.mark.parametrize(
    ("name", "given", "found"),
    [
        ("NCCL_LAUNCH_ORDER_IMPLICIT", None, "1"),
        ("NCCL_LAUNCH_ORDER_IMPLICIT", "0", "0"),
        ("GLOO_SOCKET_IFNAME", None, "lo"),
        ("GLOO_SOCKET_IFNAME", "eth0", "eth0"),
        ("NCCL_SOCKET_IFNAME", None, "lo"),
    ],
)
def test_order_and_interface_of_communicators_unless_the_user_says_otherwise(monkeypatch, name, given, found):
    environments = []

    def start(command, env):
        environments.append(env)
        return SimpleNamespace(returncode=0)

    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    monkeypatch.setattr(launch.socket, "if_nameindex", lambda: [(1, "eth0"), (2, "lo")])
    monkeypatch.setattr(launch.subprocess, "run", start)
    assert launch.launch(2, ["recipe.yaml"], threads=3) == 0
    [environment] = environments
    assert (environment[name], environment["OMP_NUM_THREADS"]) == (found, "3")


@pytest.mark.parametrize(("written", "printed"), [("no such thing", "no such thing\n"), (None, "")])
def test_the_cause_that_a_rank_wrote_is_printed_last(monkeypatch, capfd, written, printed):
    def start(command, env):
        print("a report of the launcher", file=sys.stderr)
        if written is not None:
            Path(env[CAUSE]).write_text(written, encoding="utf-8")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(launch.subprocess, "run", start)
    assert launch.launch(2, ["recipe.yaml"]) == 1
    assert capfd.readouterr().err == f"a report of the launcher\n{printed}"


@pytest.mark.parametrize(
    ("failure", "printed"),
    [
        (
            ChildFailedError("run", {1: ProcessFailure(1, 1234, -9, "none")}),
            "rank 1 ended with exit code -9: Signal 9",
        ),
        (subprocess.CalledProcessError(3, ["run"]), "the run ended with exit code 3"),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_the_launcher_tells_of_a_process_without_last_words(monkeypatch, capfd, tmp_path, failure, printed, told):
    def fail(arguments):
        raise failure

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    monkeypatch.setattr(sys, "argv", ["launcher", "run.py"])
    monkeypatch.setenv(CAUSE, str(tmp_path / "cause"))
    if told:
        (tmp_path / "cause").touch()
    with pytest.raises(SystemExit) as ended:
        launcher.main()
    assert ended.value.code == 1
    assert capfd.readouterr().err.startswith(printed) is not told
