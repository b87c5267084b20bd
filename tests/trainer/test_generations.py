"""Trainers that generate: samples of a round, and completions of a server."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest

from hf_context_parallel.trainer.generations import count_generations
from tests.helpers.vllm_server import serving

pytest.importorskip("trl", reason="TRL needs Python 3.11")

from hf_context_parallel.verification.trainers.cases import CASES
from hf_context_parallel.verification.trainers.compare import largest_error
from hf_context_parallel.verification.trainers.run import Result, run


def with_server(trainer: str, port: int, folder: str, size: int, groups: int) -> Result:
    """Train with completions of a server. The transfer of weights, which needs NCCL, is left out."""
    from trl.generation import vllm_client, vllm_generation

    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{port}"}
    case = replace(CASES[trainer], options={**CASES[trainer].options, **server})
    with (
        mock.patch.object(vllm_generation, "is_vllm_available", lambda *args, **kwargs: True),
        mock.patch.object(vllm_client, "is_vllm_available", lambda *args, **kwargs: True),
        mock.patch.object(vllm_client.VLLMClient, "init_communicator", lambda self, device: None),
        mock.patch.object(
            vllm_client.VLLMClient, "update_named_params", lambda self, metadata, parameters: list(parameters)
        ),
    ):
        return run(case, folder, size, groups)


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
@pytest.mark.parametrize("trainer", ["GRPO", pytest.param("RLOO", marks=pytest.mark.exhaustive)])
def test_completions_of_a_vllm_server_are_those_without_cp(on_ranks, tmp_path, trainer, groups):
    with serving() as server:
        port = server.server_address[1]
        expected = on_ranks(groups, with_server, trainer, port, f"{tmp_path}/whole", 0, groups)[0]
        asked, server.prompts = server.prompts, []
        for found in on_ranks(2 * groups, with_server, trainer, port, f"{tmp_path}/shards", 2, groups):
            assert largest_error(found, expected)[0] < 1e-6 and found.is_sharded
        assert server.prompts == asked  # each prompt once, whatever the number of ranks


def arguments(**changes) -> SimpleNamespace:
    values = {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 3,
        "generation_batch_size": 48,
        "num_generations": 4,
        "eval_strategy": "no",
    }
    return SimpleNamespace(**{**values, **changes})


def test_samples_of_a_round_are_counted_by_groups():
    args = arguments()
    count_generations(args, groups=2, size=2)
    assert args.generation_batch_size == 24
    count_generations(args, groups=2, size=2)  # of a second trainer with the same arguments
    assert args.generation_batch_size == 24
    count_generations(SimpleNamespace(), groups=2, size=2)  # of a trainer that does not generate


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_generations": 5}, "on 2 CP groups is 24 samples, which num_generations=5 does not divide"),
        (
            {"eval_strategy": "steps", "per_device_eval_batch_size": 1, "num_generations_eval": 4},
            "per_device_eval_batch_size on 2 CP groups is 2 samples, which num_generations=4 does not divide",
        ),
        ({"use_vllm": True, "vllm_mode": "colocate"}, "vllm_mode='colocate' starts an engine in each process"),
    ],
)
def test_generations_that_groups_cannot_share_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        count_generations(arguments(**changes), groups=2, size=2)
