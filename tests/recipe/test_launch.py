"""Environment of the processes that a recipe runs in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_context_parallel.recipe import launch


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("0", "0")])
def test_communicators_run_in_the_order_of_the_host_unless_the_user_says_otherwise(monkeypatch, given, found):
    environments = []

    def start(command, env):
        environments.append(env)
        return SimpleNamespace(returncode=0)

    monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT", raising=False)
    if given is not None:
        monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", given)
    monkeypatch.setattr(launch.subprocess, "run", start)
    assert launch.launch(2, ["recipe.yaml"], threads=3) == 0
    [environment] = environments
    assert (environment["NCCL_LAUNCH_ORDER_IMPLICIT"], environment["OMP_NUM_THREADS"]) == (found, "3")
