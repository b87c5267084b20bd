"""CP beside what accelerate does: the size that it was told, FSDP2 wherever it runs, and what is refused."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace

import psutil
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType, recursively_apply
from torch.utils.data import IterableDataset

from ..config import ContextParallelConfig, refuse
from ..context_parallel import ContextParallel
from ..data.loader import prepare_data_loader

CP_SIZE = "parallelism_config_cp_size"
"""What `accelerate launch` calls it; in capitals, the environment variable that it makes of it."""
ENABLED = "ACCELERATE_USE_PARALLELISM_CONFIG"
"""The environment variable without which accelerate reads none of the others."""
EXACT = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


def with_launched_size(config: ContextParallelConfig, accelerator: Accelerator) -> ContextParallelConfig:
    """The settings, with the size that accelerate was told where they leave it at 1.

    Raises:
        ValueError: if both say a size and not the same.
    """
    settings = accelerator.parallelism_config
    size = 1 if settings is None else settings.cp_size
    if size == 1 or size == config.size:
        return config
    if config.size == 1:
        return replace(config, size=size)
    raise ValueError(
        f"context_parallel.size={config.size} and accelerate's cp_size={size} (--{CP_SIZE}) are both the ranks of a "
        "CP group and must be the same. Say it in one place, or the same in both."
    )


def refuse_ignored_size(environment: Mapping[str, str], command: Sequence[str]) -> None:
    """Refuse a CP size that accelerate was told and does not read.

    Args:
        environment: this process's.
        command: the one that started it: the launcher's arguments. Where it ignores a size it leaves no other trace.

    Raises:
        ValueError: if there is one.
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
    """The command line of the process that started this one; empty where it cannot be read."""
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def refuse_unknown(accelerator: Accelerator) -> None:
    """Refuse what accelerate would wrap the model in and is not known to be exact.

    Raises:
        ValueError: naming it, and what to take instead.
    """
    settings, kind = accelerator.parallelism_config, accelerator.distributed_type
    cases = (
        (
            settings is not None and settings.sp_enabled,
            f"accelerate's sequence parallelism (sp_size={settings and settings.sp_size}) is not known to be exact on "
            "shards; set sp_size=1; CP does what it does",
        ),
        (
            kind == DistributedType.FSDP and not accelerator.is_fsdp2,
            "FSDP1 (fsdp_version=1) is not known to be exact on shards; take fsdp_version=2",
        ),
        (
            kind == DistributedType.DEEPSPEED,
            "DeepSpeed (which accelerate does not run on CPUs, where it would be compared) is not known to be exact "
            "on shards; take FSDP2, which shards the same as ZeRO-3",
        ),
        (kind not in EXACT, f"{kind} is not known to be exact on shards; take DDP or FSDP2"),
        (
            accelerator.mixed_precision == "fp8",
            "mixed_precision='fp8', whose scales are a shard's is not known to be exact on shards; take bf16",
        ),
    )
    refuse(cases, "context parallelism: {}.")


def start_fsdp2(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """FSDP on CPUs, where it is asked for: accelerate knows it on GPUs only, and takes DDP instead without a word.

    Args:
        plugin: as given to the Accelerator; without one, as the launcher's environment says.
    """
    asked = plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if accelerator.distributed_type != DistributedType.MULTI_CPU or not asked:
        return
    state = accelerator.state
    plugin = plugin or FullyShardedDataParallelPlugin()
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


class AnyDeviceParallelism(ParallelismConfig):
    """accelerate's ParallelismConfig, for several CPUs as for several GPUs."""

    plugin: FullyShardedDataParallelPlugin | None = None

    @classmethod
    def of(cls, settings: ParallelismConfig, plugin: FullyShardedDataParallelPlugin | None) -> AnyDeviceParallelism:
        """The same settings; `plugin` is the Accelerator's."""
        made = cls(**{field.name: getattr(settings, field.name) for field in fields(settings)})
        made.plugin = plugin
        return made

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        start_fsdp2(accelerator, self.plugin)
        if accelerator.distributed_type == DistributedType.MULTI_CPU:
            # All that is asked of it; processes with a GPU each are `multi_device`, and those without one are not.
            names = ("num_processes", "is_main_process", "is_fsdp2", "distributed_type")
            values = {name: getattr(accelerator, name) for name in names}
            accelerator = SimpleNamespace(**values, multi_device=True)
        super()._validate_accelerator(accelerator)


class CpAccelerator(Accelerator):
    """An Accelerator that knows that the ranks of a CP group have the same samples."""

    cp: ContextParallel
    _for_metrics = False

    def prepare_data_loader(self, data_loader, device_placement=None, slice_fn_for_dispatch=None):
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return super().prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
        seed = data_loader.worker_init_fn
        if isinstance(seed, functools.partial) and "rank" in seed.keywords:  # Trainer's: workers alike in a CP group
            rank = 0 if isinstance(data_loader.dataset, IterableDataset) else self.cp.groups.data_rank  # all read all
            data_loader.worker_init_fn = functools.partial(seed.func, *seed.args, **{**seed.keywords, "rank": rank})
        loader = prepare_data_loader(
            data_loader,
            self.cp.groups,
            device=self.device,
            split_batches=self.split_batches,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            rng_types=self.rng_types.copy(),
            even_batches=self.even_batches,
            use_seedable_sampler=self.use_seedable_sampler,
            data_seed=self.dataloader_config.data_seed,
            non_blocking=self.non_blocking,
            use_stateful_dataloader=self.use_stateful_dataloader,
        )
        self._dataloaders.append(loader)
        return loader

    def _prepare_cp(self, *args):
        """Accelerate would shard buffers for its own ring, which knows causal SDPA alone; cp.shard does it here."""
        return args

    def gather_for_metrics(self, input_data, use_gather_object=False):
        """Each sample once: of the ranks of a CP group, which have the same ones, the first's."""
        self._for_metrics = True
        try:
            return super().gather_for_metrics(input_data, use_gather_object)
        finally:
            self._for_metrics = False

    def gather(self, tensor):
        gathered = super().gather(tensor)
        return recursively_apply(self._first_of_each_group, gathered) if self._for_metrics else gathered

    def _first_of_each_group(self, gathered: torch.Tensor) -> torch.Tensor:
        loader = self.gradient_state.active_dataloader
        # A loader that outlives a change of the groups goes on dealing to those it was prepared for.
        groups = getattr(loader, "groups", self.cp.groups)
        ranks = gathered.unflatten(0, (self.num_processes, -1))[groups.first_ranks]
        counts = getattr(loader, "counts", None)
        if counts is None:
            return ranks.flatten(0, 1)
        return torch.cat([samples[:count] for samples, count in zip(ranks, counts)])
