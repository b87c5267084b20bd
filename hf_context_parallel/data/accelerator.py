"""Accelerator whose data loaders, metrics and schedules take a CP group for one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import recursively_apply
from torch.utils.data import DataLoader, IterableDataset

from ..compat import has_ended
from ..config import ContextParallelConfig
from ..distributed.process_groups import Groups, recommend_launch_order
from .ahead import Planner
from .collectives import from_first_ranks
from .loader import prepare_data_loader


class HasPlanner(Protocol):
    """CP group, as far as loaders use it."""

    @property
    def planner(self) -> Planner:
        """Planner of this rank."""


class HasGroups(Protocol):
    """Object that knows the CP group that is in use, and the process groups around it, such as `ContextParallel`."""

    @property
    def config(self) -> ContextParallelConfig:
        """Settings of the group."""

    @property
    def group(self) -> HasPlanner:
        """The CP group."""

    @property
    def groups(self) -> Groups:
        """Process groups around this rank."""

    @property
    def size(self) -> int:
        """Number of ranks of a CP group."""


def share_groups(accelerator: Accelerator, cp: HasGroups) -> None:
    """Let an Accelerator take each CP group for one process, in place.

    It cannot be told the class of its loaders, so its own class is set.
    """
    accelerator.__class__ = CpAccelerator
    accelerator.cp = cp
    for scheduler in accelerator._schedulers:  # that were prepared before
        count_groups(scheduler, accelerator)
    if accelerator.is_fsdp2 and cp.size > 1:
        recommend_launch_order()


class CpAccelerator(Accelerator):
    """Accelerator that gives all ranks of a CP group the same samples, and counts a group as one process."""

    cp: HasGroups
    _for_metrics = False
    _in_step = _counts_ranks = False

    @property
    def num_processes(self) -> int:
        """Number of processes, where a CP group is one: schedules, steps of an epoch and scales of losses count them.

        `state.num_processes` counts all ranks.
        """
        return self.state.num_processes // (1 if self._counts_ranks else self.cp.size)

    @contextmanager
    def counting_ranks(self) -> Iterator[None]:
        """Count each rank as a process in this block: to prepare, write and read what ranks hold parts of."""
        before, self._counts_ranks = self._counts_ranks, True
        try:
            yield
        finally:
            self._counts_ranks = before

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        """Save the states of what was prepared."""
        with self.counting_ranks():
            return super().save_state(*args, **kwargs)

    def load_state(self, *args: Any, **kwargs: Any) -> None:
        """Load the states of what was prepared."""
        with self.counting_ranks():
            super().load_state(*args, **kwargs)

    @property
    def process_index(self) -> int:
        """Number of this rank, or in `in_step()` of its CP group."""
        return self.cp.groups.data_rank if self._in_step else super().process_index

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Count CP groups in everything that accelerate is asked for in this block: a step of a trainer.

        A trainer may slice what it gathered by `process_index`, or gather by functions of `accelerate.utils`. No file
        may be written in the block, since ranks of a group would write the same one.
        """
        before, self._in_step = self._in_step, True
        try:
            with from_first_ranks(self.cp.groups.first_ranks):
                yield
        finally:
            self._in_step = before

    @property
    def is_last_process(self) -> bool:
        """Return whether this is the last rank of all."""
        return bool(self.state.process_index == self.state.num_processes - 1)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """Prepare a scheduler, which steps once for each CP group in a step of the optimizer."""
        return count_groups(super().prepare_scheduler(scheduler), self)

    def prepare_data_loader(
        self,
        data_loader: DataLoader,
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable | None = None,
    ) -> DataLoader:
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return super().prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
        seed = data_loader.worker_init_fn
        if isinstance(seed, functools.partial) and "rank" in seed.keywords:  # from the Trainer
            # Workers of a CP group draw alike. Every rank reads all samples of an iterable data set.
            rank = 0 if isinstance(data_loader.dataset, IterableDataset) else self.cp.groups.data_rank
            data_loader.worker_init_fn = functools.partial(seed.func, *seed.args, **{**seed.keywords, "rank": rank})
        loader = prepare_data_loader(
            data_loader,
            self.cp.groups,
            None if self.cp.config.dynamic else self.cp.group.planner,  # samples would move to other rows
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

    def _prepare_deepspeed(self, *args: Any) -> Any:
        """Prepare objects for DeepSpeed, whose settings count each rank and its samples."""
        with self.counting_ranks():
            prepared = super()._prepare_deepspeed(*args)
        for scheduler in prepared:
            if isinstance(scheduler, AcceleratedScheduler):
                count_groups(scheduler, self)
        return prepared

    def _prepare_cp(self, *args: Any):
        """Skip accelerate's own context parallelism, which supports causal SDPA alone."""
        return args

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Gather each sample once, from the first rank of each CP group."""
        loader = self.gradient_state.active_dataloader
        counts = getattr(loader, "counts", None)
        if counts is not None and (use_gather_object or not _has_tensors_alone(input_data)):
            input_data = input_data[: counts[self._groups_of(loader).data_rank]]
        self._for_metrics = True
        try:
            with from_first_ranks(self._groups_of(loader).first_ranks):
                return super().gather_for_metrics(input_data, use_gather_object)
        finally:
            self._for_metrics = False

    def _groups_of(self, loader: DataLoader | None) -> Groups:
        """Return the groups that a loader deals to. After a resize, an older loader deals to those of its time."""
        groups: Groups = getattr(loader, "groups", self.cp.groups)
        return groups

    def gather(self, tensor: Any) -> Any:
        """Gather a tensor of each CP group, from its first rank."""
        loader = self.gradient_state.active_dataloader if self._for_metrics else None
        with from_first_ranks(self._groups_of(loader).first_ranks):
            gathered = super().gather(tensor)
        counts = getattr(loader, "counts", None)
        return gathered if counts is None else recursively_apply(functools.partial(_real, counts), gathered)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Reduce a tensor over CP groups. Ranks of a group hold the same tensor."""
        reduced = super().reduce(tensor, reduction, scale)
        return recursively_apply(self._once, reduced) if reduction == "sum" else reduced

    def _once(self, total: torch.Tensor) -> torch.Tensor:
        share = total / self.cp.groups.same_batch.size
        return share if total.is_floating_point() else share.round().to(total.dtype)


def _has_tensors_alone(data: Any) -> bool:
    """Return whether accelerate gathers this data as tensors, and not as objects."""
    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


def _real(counts: list[int], gathered: torch.Tensor) -> torch.Tensor:
    """Leave out the repeated samples at the end of each group's."""
    groups = gathered.unflatten(0, (len(counts), -1))
    return torch.cat([samples[:count] for samples, count in zip(groups, counts)])


def count_groups(scheduler: AcceleratedScheduler, accelerator: CpAccelerator) -> AcceleratedScheduler:
    """Let a prepared scheduler step once for each CP group, in place."""
    if type(scheduler) is AcceleratedScheduler:  # others step by themselves
        scheduler.__class__ = CpScheduler
        scheduler.counts = not scheduler.split_batches
        scheduler.split_batches = True  # else accelerate would step once for each rank
        scheduler.accelerator = accelerator
    return scheduler


class CpScheduler(AcceleratedScheduler):
    """Scheduler that steps once for each batch of a step of the optimizer. A CP group reads one batch."""

    accelerator: CpAccelerator
    counts: bool

    def step(self, *args: Any, **kwargs: Any) -> None:
        if not (self.counts and self.step_with_optimizer and self.gradient_state.sync_gradients):
            super().step(*args, **kwargs)
            return
        for _ in range(self.accelerator.num_processes):
            if not has_ended(self.scheduler):
                super().step(*args, **kwargs)
