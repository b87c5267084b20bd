"""Trainer that splits each sequence over the ranks of a CP group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import recursively_apply
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback

from ..config import ContextParallelConfig
from ..context_parallel import ContextParallel
from ..data.batch import IGNORED
from ..data.collator import ContextParallelDataCollator
from ..distributed.mesh import mesh_of
from ..dynamic.scheduler import Scheduler
from ..integration.active_batch import active_batch
from ..integration.checks.model import check_model
from ..integration.patches.randomness import share_streams
from ..integration.tensor_parallel.checks import check_parallelism
from ..verification.verify import verify
from .accelerate import (
    ENABLED,
    AnyDeviceParallelism,
    CpAccelerator,
    launcher_command,
    refuse_ignored_size,
    refuse_unknown,
    start_fsdp2,
    with_launched_size,
)
from .metrics import StepWatch, throughput
from .refusals import check_trainer, check_versions
from .step_state import StepState


class ContextParallelMixin:
    """Makes a Trainer split each sequence over the ranks of a CP group: `class Mine(ContextParallelMixin, Trainer)`.

    The Trainer takes the same data set, collator and arguments as on one process. The collator yields whole batches,
    and the mixin shards them. All ranks of a CP group get the same samples, and different groups get different
    samples. The batch size is per CP group. Losses, gradient norms, evaluations and predictions equal those of one
    process. For packed batches they equal those of each document alone, even where Transformers' own attention lets
    documents see each other.

    A subclass that overrides `compute_loss` begins with `super().compute_loss`. This scales the loss so that its mean
    over all ranks is the loss of one process. The inputs and outputs that `compute_loss` sees are those of a shard.

    Training logs gain `tokens_per_second` (of all ranks), `tokens_per_second_per_rank`, `sequence_length` (the longest
    since the last log) and `peak_memory_gib` (above the start of a step, of the rank that needed most).

    With `dynamic`, the samples that all ranks loaded for an optimizer step are dealt to groups of several sizes by
    `Scheduler`. A training step then runs the model once or several times, and each run calls `compute_loss` with
    other rows. Logs gain `idle_share`, which is estimated. Evaluation and prediction run on groups of `size` ranks.

    Before the first step, `train()` compares the model on shards with the model on whole sequences; see `verify`.

    Args:
        context_parallel: the CP settings. Without them, a CP group is one rank.
        args, kwargs: the arguments of the Trainer.

    Raises:
        ValueError: if an argument or the model cannot be exact on shards.
    """

    def __init__(self, *args: Any, context_parallel: ContextParallelConfig | None = None, **kwargs: Any):
        check_versions()
        self._config = context_parallel or ContextParallelConfig()
        self._step_state = StepState()
        super().__init__(*args, **kwargs)
        if isinstance(self.data_collator, ContextParallelDataCollator):
            self.data_collator = self.data_collator.collator  # the mixin shards: predictions need whole batches
        check_model(self.model)
        check_parallelism(self.model, self.cp.group)
        check_trainer(self, self._config)
        if self._config.verify and self.cp.size > 1:
            self.add_callback(_Verification(self))
        self._watch = StepWatch(self.args.device)
        self.add_callback(self._watch)
        self._scheduler: Scheduler | None = None
        if self._config.dynamic:
            sharded = self.is_fsdp_enabled or isinstance(self.model, FSDPModule)
            self._scheduler = Scheduler(self.cp, self.model, sharded)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        self._fsdp_plugin = arguments.get("fsdp_plugin")
        settings = arguments.get("parallelism_config")
        if settings is None and os.environ.get(ENABLED, "false").lower() == "true":
            settings = ParallelismConfig()  # reads the environment of the launcher
        if settings is not None:
            arguments["parallelism_config"] = AnyDeviceParallelism.of(settings, self._fsdp_plugin)
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        refuse_ignored_size(os.environ, launcher_command())
        super().create_accelerator_and_postprocess()
        start_fsdp2(self.accelerator, self._fsdp_plugin)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        refuse_unknown(self.accelerator)
        self._config = with_launched_size(self._config, self.accelerator)
        mesh = mesh_of(self.model) if self.model is not None else None
        self.cp = ContextParallel(self._config, self.accelerator.torch_device_mesh if mesh is None else mesh)
        # The Trainer has no hook for the class of its Accelerator, so the class is set afterwards.
        self.accelerator.__class__ = CpAccelerator
        self.accelerator.cp = self.cp
        self.gather_function = self.accelerator.gather_for_metrics

    def get_cp_size(self) -> int:
        """Return the size of a CP group, by which Trainer divides batch sizes."""
        return self.cp.size

    def _prepare_context_parallel_inputs(self, model: torch.nn.Module, inputs: Mapping[str, Any]):
        """Shard the inputs of a step, as the hook of the Trainer that returns the step's context and its inputs."""
        if self._step_state.predicting:  # prediction_step has already sharded the inputs
            return nullcontext, inputs
        sharded = self.cp.shard(self._prepare_inputs(inputs), model)
        step = ExitStack()
        local = step.enter_context(sharded)
        step.enter_context(self._prepared(local))
        if self._scheduler is None:
            self._count(sharded.shard.batch_size * sharded.shard.length, sharded.shard.length)
        return lambda: step, local

    @contextmanager
    def _prepared(self, local: Mapping[str, Any]) -> Iterator[None]:
        """Leave the shard unchanged when Trainer calls `_prepare_inputs` with it.

        The whole batch has already been prepared. Preparing twice could be wrong, because a subclass may do more than
        move tensors, such as masking labels.
        """
        prepare, own = self._prepare_inputs, vars(self).get("_prepare_inputs")

        def prepare_others(inputs):
            # The shard is recognised by its tensors, since a subclass may have put them into another dictionary.
            tensors = {name: value for name, value in local.items() if isinstance(value, torch.Tensor)}
            ours = isinstance(inputs, Mapping) and any(inputs.get(name) is tensors[name] for name in tensors)
            return inputs if ours else prepare(inputs)

        self._prepare_inputs = prepare_others
        try:
            yield
        finally:
            if own is None:
                del self._prepare_inputs
            else:
                self._prepare_inputs = own

    def _count(self, tokens: int, longest: int) -> None:
        """Count the tokens that this rank's group computes, for the logs."""
        self._step_state.count(tokens / self.cp.groups.same_batch.size, longest)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Load the batches of an optimizer step, and with `dynamic` schedule all their samples together.

        Samples of several batches can be dealt more evenly than those of one batch.
        """
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._scheduler is not None and batches:
            rounds, steps = self._scheduler.rounds(batches), len(batches)
            edges = [len(rounds) * step // steps for step in range(steps + 1)]
            self._step_state.rounds = [rounds[start:stop] for start, stop in zip(edges, edges[1:])]
        return batches, num_items_in_batch

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run a training step, with `dynamic` round by round. Its loss must come from the mixin's `compute_loss`."""
        if self._scheduler is None:
            return self._finite_together(self._checked_step(model, inputs, num_items_in_batch))
        rounds = self._step_state.rounds.pop(0) if self._step_state.rounds else self._scheduler.rounds([inputs])
        loss = torch.zeros((), device=self.args.device)
        sync = self.accelerator.gradient_state.sync_gradients
        try:
            for number, round in enumerate(rounds, start=1):
                last = not self._step_state.rounds and number == len(rounds)
                self.cp.switch(round.size)
                self._count(round.tokens, round.longest)
                self.accelerator.gradient_state._set_sync_gradients(sync and last)
                with nullcontext() if last else self._without_reduction(model):
                    loss = loss + self._checked_step(model, round.batch, num_items_in_batch)
        finally:
            self.cp.switch(self._config.size)
            self.accelerator.gradient_state._set_sync_gradients(sync)
        return self._finite_together(loss)

    def _finite_together(self, loss: torch.Tensor) -> torch.Tensor:
        """Make the loss non-finite on all ranks if it is non-finite on one.

        The `logging_nan_inf_filter` then leaves a step out of the logs on all ranks or on none.
        """
        if not self.args.logging_nan_inf_filter or not dist.is_initialized():
            return loss
        total = loss.clone()
        dist.all_reduce(total, group=self.cp.groups.group if self._scheduler is None else None)
        return torch.where(total.isfinite(), loss, total)

    def _without_reduction(self, model: torch.nn.Module) -> AbstractContextManager:
        """Return a context in which backward adds up gradients without reducing them over ranks."""
        if self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            return nullcontext()
        if isinstance(self.model, FSDPModule) and hasattr(self, "_defer_fsdp_gradient_reduction"):
            return self._defer_fsdp_gradient_reduction()  # accelerate does not know of a model sharded while loading
        return self.accelerator.no_sync(model)

    def _checked_step(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        self._step_state.loss_is_ours = False
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._refuse_other_losses()
        return loss

    def _refuse_other_losses(self) -> None:
        if not self._step_state.loss_is_ours:
            raise ValueError(
                f"{type(self).__name__}.compute_loss does not call super().compute_loss, and a mean over a shard "
                "is not the mean over the batch. Begin with super().compute_loss(..., return_outputs=True), and keep "
                "its loss, or add sums over the tokens of this shard that are divided by the same count."
            )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute Trainer's loss, scaled so that its mean over all ranks is the loss of one process."""
        self._step_state.loss_is_ours = True
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            return result  # Trainer has scaled it
        if active_batch() is None:
            return result  # a user's own call on whole sequences
        # The model divided its sum by the count of the whole batch, and DDP takes the mean over the group's sums.
        if return_outputs:
            return result[0] * self.cp.size, result[1]
        return result * self.cp.size

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Count the targets of the samples of all CP groups, each sample once.

        Without `average_tokens_across_devices`, it is the count of this rank's samples, divided by the size of the
        group, because DDP takes the mean over its ranks.
        """
        if self._step_state.predicting:
            return self._step_state.whole_num_items
        labelled = batch_samples and not {"labels", "shift_labels"}.isdisjoint(batch_samples[0])
        if not (self.model_accepts_loss_kwargs and labelled):
            return None
        count = torch.stack([self._targets(batch).ne(IGNORED).sum() for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices:
            return self.accelerator.gather(count[None])[self.cp.groups.first_ranks].sum()
        return count / self.cp.groups.size

    def _targets(self, batch: Mapping[str, Any]) -> torch.Tensor:
        if "shift_labels" in batch:
            return batch["shift_labels"]
        return batch["labels"][..., 1:] if self._loss_shifts_labels else batch["labels"]

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Run a prediction step, which returns whole outputs in the order of the batch on every rank."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        self._step_state.whole_num_items = self._get_num_items_in_batch([inputs], self.args.device)
        with self.cp.shard(inputs, model) as local, self._prepared(local):
            self._step_state.predicting, self._step_state.loss_is_ours = True, False
            try:
                loss, outputs, _ = super().prediction_step(model, local, prediction_loss_only, ignore_keys)
                outputs = recursively_apply(self._gather_output, outputs) if outputs is not None else None
            finally:
                self._step_state.predicting = False
        if loss is not None:
            self._refuse_other_losses()
        if loss is not None and self.cp.size > 1:
            dist.all_reduce(loss, group=self.cp.groups.group)
            loss = loss / self.cp.size
        return loss, outputs, labels if outputs is not None else None

    def _gather_output(self, output: torch.Tensor) -> torch.Tensor:
        shard = active_batch().shard
        if tuple(output.shape[:2]) != shard.local_shape:
            raise ValueError(
                f"the model returned an output of shape {tuple(output.shape)}, which does not begin with the rows and "
                f"tokens of the shard, {shard.local_shape}, so it cannot be gathered. Name it in ignore_keys, or set "
                "prediction_loss_only=True."
            )
        return self.cp.gather(output)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> float:
        """Compute this rank's share of the operations of the whole batch, since Trainer sums over ranks."""
        return super().floating_point_ops(inputs) / self.cp.groups.same_batch.size

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # sums the whole batch over all ranks of the group
        self.state.num_input_tokens_seen = (
            before + (self.state.num_input_tokens_seen - before) // self.cp.groups.same_batch.size
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load random states, and then share them within each group.

        A checkpoint that fewer ranks wrote has random states for some of the ranks only.
        """
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self.cp.groups.same_batch.size > 1:
            share_streams(self.cp.groups.same_batch)

    def _finalize_training(self, *args: Any, **kwargs: Any):
        """Average the loss since the last log over ranks, because Trainer adds it to a total that is averaged."""
        self._tr_loss = self.accelerator.gather(self._tr_loss[None]).mean()
        return super()._finalize_training(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._step_state.all_log = True
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._step_state.all_log = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add throughput, sequence length and memory to the training loss that all ranks log.

        A user's own call adds nothing, since it may come from some ranks only.
        """
        if self._step_state.all_log and "loss" in logs:
            logs |= throughput(self._step_state, self._watch, self.accelerator)
            if self._scheduler is not None:
                logs["idle_share"] = round(self._scheduler.idle_share(), 6)
        super().log(logs, start_time)


class ContextParallelTrainer(ContextParallelMixin, Trainer):
    """Trainer of Transformers with `context_parallel=ContextParallelConfig(...)`. See `ContextParallelMixin`."""


class _Verification(TrainerCallback):
    """Callback that verifies the wrapped model before training, after the weights of a checkpoint are loaded."""

    def __init__(self, trainer: ContextParallelMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs: Any):
        verify(self._trainer.model_wrapped, self._trainer.cp)
