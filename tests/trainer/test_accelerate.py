"""CP together with DDP, FSDP2, HSDP and DeepSpeed: losses and gradient norms equal those of one process."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_context_parallel as hcp
from hf_context_parallel.distributed.worker_pool import WorkerPool
from hf_context_parallel.recipe.launch import DEFAULTS
from hf_context_parallel.trainer.accelerate import refuse_ignored_size
from tests.helpers.models import needs_sharding_while_loading, some_labels, tiny_model, tokens
from tests.helpers.trainer import STOCK, history, make_trainer

WINDOWS = {"model_type": "gemma3_text", "collator": "packed", "gradient_accumulation_steps": 2}
"""Model with sliding windows, which accelerate's own context parallelism refuses."""
FSDP1 = {"FSDP_VERSION": "1", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_SYNC_MODULE_STATES": "false"}
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]


def sharded_history(size, folder, sizes, options) -> list[tuple[float, float]]:
    """Train a model that Transformers shards while loading it, and return loss and gradient norm of each step."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="context_parallel", distributed_config=DistributedConfig(**sizes)
    )
    return history(size, folder, {**options, "model": model})


@needs_sharding_while_loading
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        pytest.param("qwen3", {"fsdp_size": 4}, marks=pytest.mark.exhaustive),
        ("qwen3", {"fsdp_size": 2, "dp_replicate_size": 2}),
        ("qwen3_moe", {"fsdp_size": 4, "ep_size": 2}),
        pytest.param("qwen3_moe", {"fsdp_size": 4, "ep_size": 4}, marks=pytest.mark.exhaustive),
        pytest.param(
            "qwen3_moe", {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2}, marks=pytest.mark.exhaustive
        ),
    ],
    ids=["FSDP", "HSDP", "experts within FSDP", "experts as FSDP", "experts within HSDP"],
)
def test_a_model_sharded_by_transformers(on_ranks, tmp_path, model_type, sizes):
    options = {"collator": "packed", "gradient_accumulation_steps": 2}
    tiny_model(model_type, None, torch.float32).save_pretrained(tmp_path)
    [expected] = on_ranks(1, history, STOCK, tmp_path, {"model_type": model_type, **options})
    for found in on_ranks(4, sharded_history, 2, tmp_path, sizes, options):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def launcher_environment(**sizes) -> dict[str, str]:
    """Variables that `accelerate launch --use_fsdp --fsdp_version 2 --use_parallelism_config ...` sets."""
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    if sizes:
        environment["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    return environment | {f"PARALLELISM_CONFIG_{name.upper()}": str(size) for name, size in sizes.items()}


def launched(environment, function, *args):
    """Call a function with the environment variables of accelerate's launcher, and return its result."""
    before = dict(os.environ)
    os.environ |= environment
    try:
        return function(*args)
    finally:
        os.environ.clear()
        os.environ |= before


def fsdp2_history(folder, size, options) -> list[tuple[float, float]]:
    """Train under accelerate's FSDP2 with CP groups of 2, and return loss and gradient norm of each step.

    `size` is the size in the CP settings, which may be 1 so that accelerate's is taken.
    """
    trainer = make_trainer(2, folder, **options, settings={"size": size})
    trainer.train()
    assert trainer.cp.size == 2 and trainer.accelerator.is_fsdp2 and isinstance(trainer.model_wrapped, FSDPModule)
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("ranks", "sizes", "size"),
    [
        (4, {"cp_size": 2, "dp_shard_size": 2}, 1),
        pytest.param(4, {"dp_shard_size": 2, "dp_replicate_size": 2}, 2, marks=pytest.mark.exhaustive),
        (2, {}, 2),
    ],
    ids=["accelerate says the size", "replicas", "no sizes"],
)
def test_accelerates_fsdp2(on_ranks, tmp_path, ranks, sizes, size):
    [expected] = on_ranks(1, history, STOCK, tmp_path, WINDOWS)
    for found in on_ranks(ranks, launched, launcher_environment(**sizes), fsdp2_history, tmp_path, size, WINDOWS):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_weights_gradients_and_optimizer_that_fsdp2_keeps_on_the_host(on_ranks, tmp_path):
    environment = launcher_environment() | {"FSDP_OFFLOAD_PARAMS": "true"}
    options = {"gradient_checkpointing": True, "max_grad_norm": 0.1}
    [expected] = on_ranks(1, history, STOCK, tmp_path, options)
    for found in on_ranks(2, launched, environment, offloaded_history, tmp_path, options):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def offloaded_history(folder, options) -> list[tuple[float, float]]:
    """Train with CP groups of 2 and MLPs on tiles, where FSDP2 fetches the weights of each layer from the host."""
    trainer = make_trainer(2, folder, **options, settings={"tile_tokens": 16})
    trainer.train()
    assert isinstance(trainer.accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    assert trainer.accelerator.is_fsdp2 and isinstance(trainer.model_wrapped, FSDPModule)
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def accelerate_launch(folder, *options) -> subprocess.CompletedProcess:
    """Start four processes of a script that trains, as on a machine with GPUs."""
    script = folder / "script.py"
    script.write_text(
        "import json, os\n"
        "from accelerate import PartialState\n"
        "from tests.trainer.test_accelerate import WINDOWS, fsdp2_history\n"
        "PartialState(cpu=True)\n"
        f"found = fsdp2_history({str(folder)!r}, 1, WINDOWS)\n"
        f"open({str(folder)!r} + '/' + os.environ['RANK'] + '.json', 'w').write(json.dumps(found))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes=4", *DEFAULTS]
    return subprocess.run(
        [*launcher, *FSDP2, *options, str(script)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.exhaustive
def test_accelerate_launch_sets_our_size(on_ranks, tmp_path):
    sizes = ["--parallelism_config_cp_size", "2", "--parallelism_config_dp_shard_size", "2"]
    run = accelerate_launch(tmp_path, "--use_parallelism_config", *sizes)
    assert run.returncode == 0, run.stderr
    [expected] = on_ranks(1, history, STOCK, tmp_path, WINDOWS)
    for rank in range(4):
        np.testing.assert_allclose(json.loads((tmp_path / f"{rank}.json").read_text()), expected, rtol=1e-5)


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_accelerate_launch_without_the_enabling_flag_is_told(tmp_path):
    run = accelerate_launch(tmp_path, "--parallelism_config_cp_size", "2")
    assert run.returncode != 0
    assert "--parallelism_config_cp_size 2 is ignored by accelerate without --use_parallelism_config" in run.stderr


@pytest.mark.parametrize(
    ("environment", "command", "refused"),
    [
        ({}, ["accelerate", "launch", "--parallelism_config_cp_size", "2", "script.py"], True),
        ({}, ["accelerate", "launch", "--parallelism-config-cp-size=2", "script.py"], True),
        ({}, ["accelerate", "launch", "--parallelism_config_cp_size", "1", "script.py"], False),
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, ["torchrun", "script.py"], True),
        ({"PARALLELISM_CONFIG_CP_SIZE": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], False),
        ({}, [], False),
    ],
)
def test_a_size_that_accelerate_ignores_is_refused(environment, command, refused):
    with pytest.raises(ValueError, match=r"context_parallel\.size=2") if refused else nullcontext():
        refuse_ignored_size(environment, command)


def refusal(function, *args) -> str:
    with pytest.raises(ValueError) as caught:
        function(*args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("environment", "size", "said"),
    [
        (launcher_environment() | FSDP1, 2, "FSDP1 (fsdp_version=1) has not been shown to be exact"),
        (
            launcher_environment(cp_size=2, dp_shard_size=2),
            4,
            "context_parallel.size=4 and accelerate's cp_size=2",
        ),
        (launcher_environment(sp_size=2, dp_shard_size=2), 2, "accelerate's sequence parallelism (sp_size=2)"),
        (launcher_environment(dp_shard_size=4), 3, "size=3 does not divide the mesh dimension 'dp_shard', which is 4"),
    ],
    ids=["FSDP1", "two sizes", "sequence parallelism", "a size that does not divide"],
)
def test_what_does_not_fit_is_refused_alike_on_all_ranks(on_ranks, tmp_path, environment, size, said):
    for found in on_ranks(4, refusal, launched, environment, fsdp2_history, tmp_path, size, WINDOWS):
        assert said in found


def different_sizes() -> str:
    return refusal(hcp.ContextParallel, hcp.ContextParallelConfig(size=2 + 2 * (dist.get_rank() == 3)))


def test_ranks_that_ask_for_different_sizes_are_refused_alike(on_ranks):
    for found in on_ranks(4, different_sizes):
        assert found.startswith("rank 0 asks for CP groups of size=2 and rank 3 for size=4. Give every process")


def zero_steps(stage: int, on_host: tuple[str, ...], size: int) -> tuple[list[float], list[torch.Tensor]]:
    """Run steps of DeepSpeed's engine, each on one row per CP group, and return losses and final parameters.

    Args:
        on_host: what lies in the memory of the host: `optimizer`, `param`.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.init_distributed("gloo")
    model = tiny_model("qwen3", "context_parallel", torch.float32)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **{f"offload_{what}": {"device": "cpu"} for what in on_host}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1e9,  # DeepSpeed's default is 1
    }
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd, config=settings)
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size))
    rows, targets = rows_of_groups(cp.groups.data_size)
    losses = []
    for _ in range(2):
        with cp.shard({**rows[cp.groups.data_rank], "num_items_in_batch": targets}, engine) as local:
            loss = engine(**local).loss
            engine.backward(loss * dist.get_world_size())  # ZeRO takes the mean over all ranks
        engine.step()
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(loss.item())
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return losses, [parameter.detach().clone() for parameter in engine.module.parameters()]


def rows_of_groups(groups: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Make one row for each group, and count the targets of all rows."""
    rows = [{"input_ids": tokens(1, 37 + 4 * group, group)} for group in range(groups)]
    for group, row in enumerate(rows):
        row["labels"] = some_labels(row["input_ids"], group)
    return rows, sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows)


@pytest.fixture
def on_new_ranks():
    """Fixture of new ranks for DeepSpeed, which keeps the process groups that it found first.

    Their timeout is long, because DeepSpeed compiles its extensions when they are first used.
    """
    workers = WorkerPool(4, 900)
    yield workers
    workers.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("stage", "on_host"), [(1, ()), (2, ()), (3, ()), (2, ("optimizer",)), (3, ("optimizer", "param"))]
)
def test_a_loop_with_deepspeeds_zero_trains_as_one_process(on_new_ranks, stage, on_host):
    pytest.importorskip("deepspeed", reason="it comes with `pip install -e '.[deepspeed]'`")
    model = tiny_model("qwen3", "sdpa", torch.float32)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    rows, targets = rows_of_groups(2)
    expected = []
    for _ in range(2):
        losses = [model(**row, use_cache=False, num_items_in_batch=targets).loss for row in rows]
        sum(losses).backward()
        sgd.step()
        sgd.zero_grad()
        expected.append(sum(loss.item() for loss in losses))
    for found, parameters in on_new_ranks(4, zero_steps, stage, on_host, 2):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        for parameter, of_one in zip(parameters, model.parameters(), strict=True):
            torch.testing.assert_close(parameter, of_one.detach(), rtol=1e-5, atol=1e-6)
