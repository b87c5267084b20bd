"""Environment of the processes that a recipe runs in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_context_parallel.recipe import launch


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
