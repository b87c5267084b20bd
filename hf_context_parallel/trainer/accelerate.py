"""CP together with accelerate: the CP size from its launcher, FSDP2 on any device, and refusal of other settings."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace

import psutil
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

from ..config import ContextParallelConfig, refuse

CP_SIZE = "parallelism_config_cp_size"
"""Option of `accelerate launch` for the CP size. The environment variable that it sets has the name in capitals."""
ENABLED = "ACCELERATE_USE_PARALLELISM_CONFIG"
"""Environment variable that must be true for accelerate to read the other parallelism variables."""
EXACT = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)
"""Kinds of distributed training that are exact on shards."""


def with_launched_size(config: ContextParallelConfig, accelerator: Accelerator) -> ContextParallelConfig:
    """Take the CP size from accelerate's settings if `config.size` is 1.

    Raises:
        ValueError: if both give a size and the sizes differ.
    """
    settings = accelerator.parallelism_config
    size = 1 if settings is None else settings.cp_size
    if size == 1 or size == config.size:
        return config
    if config.size == 1:
        return replace(config, size=size)
    raise ValueError(
        f"context_parallel.size={config.size} and accelerate's cp_size={size} (--{CP_SIZE}) both set the size of a CP "
        "group and differ. Set it in one place, or to the same size in both."
    )


def refuse_ignored_size(environment: Mapping[str, str], command: Sequence[str]) -> None:
    """Refuse a CP size that was given to accelerate and that accelerate ignores.

    Args:
        environment: the environment variables of this process.
        command: the command line of the process that started this one. If the launcher ignores a size, its own
            arguments are the only trace of it.

    Raises:
        ValueError: if accelerate ignores a size other than 1.
    """
    if environment.get(ENABLED, "false").lower() == "true":
        return
    said = environment.get(CP_SIZE.upper(), "1")
    words = [word.replace("-", "_") for argument in command for word in argument.split("=", 1)]
    for option, value in zip(words, words[1:]):
        if option == f"__{CP_SIZE}":
            said = value
    if said != "1":
        raise ValueError(
            f"--{CP_SIZE} {said} is ignored by accelerate without --use_parallelism_config (which needs --use_fsdp "
            f"--fsdp_version 2). Add that, or leave the size out and set context_parallel.size={said}."
        )


def launcher_command() -> list[str]:
    """Read the command line of the process that started this one. It is empty if it cannot be read."""
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def refuse_unknown(accelerator: Accelerator) -> None:
    """Refuse settings of accelerate that have not been shown to be exact on shards.

    Raises:
        ValueError: with the setting and the one to use instead.
    """
    settings, kind = accelerator.parallelism_config, accelerator.distributed_type
    cases = (
        (
            settings is not None and settings.sp_enabled,
            f"accelerate's sequence parallelism (sp_size={settings and settings.sp_size}) has not been shown to be "
            "exact on shards. Set sp_size=1, since CP already splits the sequence",
        ),
        (
            kind == DistributedType.FSDP and not accelerator.is_fsdp2,
            "FSDP1 (fsdp_version=1) has not been shown to be exact on shards. Set fsdp_version=2",
        ),
        (kind not in EXACT, f"{kind} has not been shown to be exact on shards. Use DDP or FSDP2"),
        (
            accelerator.mixed_precision == "fp8",
            "mixed_precision='fp8' computes its scales from one shard, which has not been shown to be exact. Use bf16",
        ),
    )
    refuse(cases, "context parallelism: {}.")


def start_fsdp2(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Switch FSDP2 on for CPUs if it was asked for. Accelerate has FSDP for GPUs only, and silently uses DDP on CPUs.

    Args:
        accelerator: the Accelerator, whose state is changed in place.
        plugin: the plugin that the Accelerator was given. Without one, the environment of the launcher decides.
    """
    asked = plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if accelerator.distributed_type != DistributedType.MULTI_CPU or not asked:
        return
    state = accelerator.state
    plugin = plugin or FullyShardedDataParallelPlugin()
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # only an accelerator has pinned memory
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def start_deepspeed(accelerator: Accelerator, plugin: DeepSpeedPlugin | None) -> None:
    """Switch DeepSpeed on for CPUs if it was asked for. On CPUs accelerate silently uses DDP in its place.

    Args:
        accelerator: the Accelerator, whose state is changed in place.
        plugin: the plugin that the Accelerator was given, or None.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU or plugin is None:
        return
    state = accelerator.state
    plugin.set_mixed_precision(state.mixed_precision)
    plugin.select(_from_accelerator_state=True)
    state.deepspeed_plugins = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    importlib.import_module("deepspeed").init_distributed(state.backend, auto_mpi_discovery=False)


class AnyDeviceParallelism(ParallelismConfig):
    """ParallelismConfig of accelerate that is also valid for several processes on CPUs."""

    plugin: FullyShardedDataParallelPlugin | None = None

    @classmethod
    def of(cls, settings: ParallelismConfig, plugin: FullyShardedDataParallelPlugin | None) -> AnyDeviceParallelism:
        """Copy settings; `plugin` is the FSDP plugin that the Accelerator was given."""
        made = cls(**{field.name: getattr(settings, field.name) for field in fields(settings)})
        made.plugin = plugin
        return made

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        start_fsdp2(accelerator, self.plugin)
        if accelerator.distributed_type == DistributedType.MULTI_CPU:
            # Validation reads these attributes alone. It asks for `multi_device`, which is False on CPUs.
            names = ("num_processes", "is_main_process", "is_fsdp2", "distributed_type")
            values = {name: getattr(accelerator, name) for name in names}
            accelerator = SimpleNamespace(**values, multi_device=True)
        super()._validate_accelerator(accelerator)
