"""Trainer that splits each sequence over the ranks of a CP group."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.utils import gather
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..config import ContextParallelConfig
from ..context_parallel import ContextParallel
from ..data.accelerator import share_groups
from ..data.ahead import moved
from ..data.batch import IGNORED
from ..data.collator import ContextParallelDataCollator
from ..distributed.agreement import agreed_error, collective, of_first_rank
from ..distributed.failures import noted, reported_failures
from ..distributed.mesh import mesh_of, world
from ..distributed.process_groups import set_timeout_of_world
from ..dynamic.media import trains_towers
from ..dynamic.scheduler import Scheduler
from ..integration.border.head import TARGET_WEIGHTS
from ..integration.border.parallelize import models_to_shard, parallelize
from ..integration.checks.proofs import Unproven
from ..integration.patches.randomness import share_streams, take_streams_of_processes
from ..integration.switches import allow_unchecked_models
from ..verification.verify import verify
from .accelerate import (
    ENABLED,
    AnyDeviceParallelism,
    launcher_command,
    refuse_ignored_size,
    refuse_unknown,
    start_deepspeed,
    start_fsdp2,
    with_launched_size,
)
from .checkpoints import starting_point
from .generations import count_generations
from .loss_watch import LossWatch
from .metrics import StepWatch, count_steps, throughput
from .out_of_memory import advised
from .refusals import check_trainer, check_versions, use_unused_parameters
from .run_lock import only_run_in
from .saving import CheckpointSaving
from .step_state import StepState
from .targets import StepTargets, check_samples

logger = logging.getLogger(__name__)


class ContextParallelMixin:
    """Makes a Trainer split each sequence over the ranks of a CP group: `class Mine(ContextParallelMixin, Trainer)`.

    The Trainer takes the same data set, collator and arguments as on one process. All ranks of a CP group get the same
    whole batches, and different groups get different samples. The batch size is per CP group. The model is prepared by
    `parallelize`, so `compute_loss`, `compute_loss_func`, metrics and predictions see whole batches, as on one
    process, and losses, gradient norms, evaluations and predictions equal those of one process. For packed batches
    they equal those of each document alone, even where Transformers' own attention lets documents see each other.

    Other models that the Trainer holds, such as a reference or a teacher, are prepared too if they were loaded with
    `attn_implementation="context_parallel"`.

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
        self._step_targets = StepTargets()
        self._saving = CheckpointSaving(self, self._config.on_save_error)
        super().__init__(*args, **kwargs)
        if isinstance(self.data_collator, ContextParallelDataCollator):
            self.data_collator = self.data_collator.collator  # the model shards, and takes whole batches
        if self.args.world_size > 1:
            take_streams_of_processes(self.cp.groups.data_rank)  # a trainer may seed each rank by its number
        self._unproven: list[torch.nn.Module] = []
        for model in (self.model, *models_to_shard(self)):
            self._prepare(model)
        check_trainer(self, self._config)
        if self._config.verify and self.cp.size > 1:
            self.add_callback(_Verification(self))
        self.add_callback(_SampleCheck(self))
        self._watch = StepWatch(self.args.device)
        self.add_callback(self._watch)
        self._loss_watch = None
        if self._config.nan_steps:
            # The mean over no target is NaN.
            self._loss_watch = LossWatch(self._config.nan_steps, lambda: self._check_targets(ended=True))
            self.add_callback(self._loss_watch)
        self._scheduler: Scheduler | None = None
        if self._config.dynamic:
            sharded = self.is_fsdp_enabled or isinstance(self.model, FSDPModule)
            self._scheduler = Scheduler(self.cp, self.model, sharded)

    def _prepare(self, model: torch.nn.Module) -> None:
        """Prepare a model. One that is in no table is compared before the first step."""
        try:
            parallelize(model, self.cp)
        except Unproven:
            with allow_unchecked_models():
                parallelize(model, self.cp)
            self._unproven.append(model)

    def _prove(self) -> None:
        """Compare the models that are in no table."""
        while self._unproven:
            verify(self._unproven.pop(), self.cp)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        if self._config.dynamic and self.args.world_size > 1 and not self.args.fsdp and trains_towers(self.model):
            use_unused_parameters(self.args)
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
        start_deepspeed(self.accelerator, self.args.deepspeed_plugin)
        self.is_deepspeed_enabled = getattr(self.accelerator.state, "deepspeed_plugin", None) is not None
        refuse_unknown(self.accelerator)
        self._keep_timeout()
        self._config = with_launched_size(self._config, self.accelerator)
        mesh = mesh_of(self.model) if self.model is not None else None
        self.cp = ContextParallel(self._config, self.accelerator.torch_device_mesh if mesh is None else mesh)
        share_groups(self.accelerator, self.cp)
        count_generations(self.args, self.accelerator.num_processes, self.cp.size)
        self.gather_function = self.accelerator.gather_for_metrics

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train. While a run that saves trains, no other run may train into its `output_dir`.

        If this rank waits in vain for another one, its error says for which.

        Args:
            resume_from_checkpoint: the folder of a checkpoint, or True for the newest whole one of `output_dir`. If
                there is none, the run starts at its first step.

        Raises:
            ValueError: on every rank, if the checkpoint is not whole, or another run trains into `output_dir`.
        """
        saves = self.args.save_strategy != "no"
        with noted("train()"), only_run_in(self.args.output_dir, world()) if saves else nullcontext():
            checkpoint: str | None = None
            if saves or resume_from_checkpoint:
                run_dir, first_of_machine = Path(self._get_output_dir(trial)), self.args.local_process_index == 0
                checkpoint = starting_point(run_dir, resume_from_checkpoint, world(), first_of_machine)
            return super().train(checkpoint, trial, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, or none if the checkpoint is of the last step. Trainer would train for one more."""
        if self.state.global_step >= self.state.max_steps:
            if self.is_world_process_zero():
                logger.warning("nothing is left to train: step %d was the last", self.state.global_step)
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder of the run, and while a checkpoint is written the folder that it is written into."""
        return self._saving.folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint, which is whole or not there. There is none of weights that are not finite.

        With `nan_steps=None` they are saved too.
        """
        if self._loss_watch is not None and self._loss_watch.is_broken(self.model):
            if self.is_world_process_zero():
                step = self.state.global_step
                logger.warning("no checkpoint of step %d is saved: its loss or its weights are NaN or infinite", step)
            return
        with reported_failures(self.cp.groups.same_batch, f"saving after step {self.state.global_step}"):
            write = partial(super()._save_checkpoint, model, trial)
            with self.accelerator.counting_ranks():
                folder = self._saving.save(self._get_output_dir(trial), write)
        if folder is not None and self.args.push_to_hub:
            self._push_from_checkpoint(folder)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model."""
        with self.accelerator.counting_ranks():
            super().save_model(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.accelerator.counting_ranks():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with self.accelerator.counting_ranks():
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self.accelerator.counting_ranks():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model. Where there is one, each of its files is replaced at once."""
        with self._saving.writing_model(output_dir or self.args.output_dir) as folder:
            super()._save(folder, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint to the hub, when it is in its place."""
        if self._saving.folder is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _keep_timeout(self) -> None:
        """Keep to `ddp_timeout` on CPUs too, where Transformers drops it."""
        default = next(field.default for field in fields(TrainingArguments) if field.name == "ddp_timeout")
        if self.args.ddp_timeout != default and world().size > 1 and world().device.type == "cpu":
            set_timeout_of_world(timedelta(seconds=self.args.ddp_timeout))

    def call_model_init(self, trial: Any = None) -> torch.nn.Module:
        """Make a model by `model_init`, for a run of `train` too, and prepare it."""
        model = super().call_model_init(trial)
        if hasattr(self, "cp"):
            self._prepare(model)
        return model

    def get_cp_size(self) -> int:
        """Return the size of a CP group, by which Trainer divides batch sizes."""
        return self.cp.size

    def _prepare_context_parallel_inputs(self, model: torch.nn.Module, inputs: Mapping[str, Any]):
        """Leave the inputs whole. Trainer would shard them for accelerate's own context parallelism."""
        return nullcontext, inputs

    def _count(self, tokens: int, longest: int) -> None:
        """Count the tokens that this rank's group computes, for the logs."""
        self._step_state.running = tokens, self.cp.size
        self._step_state.count(tokens / self.cp.groups.same_batch.size, longest)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Load the batches of an optimizer step, and with `dynamic` schedule all their samples together.

        Samples of several batches can be dealt more evenly than those of one batch.
        """
        with noted(f"loading the data of step {self.state.global_step + 1}"):
            batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._scheduler is not None and batches:
            rounds, steps = self._scheduler.rounds(batches), len(batches)
            edges = [len(rounds) * step // steps for step in range(steps + 1)]
            self._step_state.rounds = [rounds[start:stop] for start, stop in zip(edges, edges[1:])]
        return batches, num_items_in_batch

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run a training step, with `dynamic` round by round. An error for want of memory gains a note.

        Raises:
            ValueError: if the inputs are no mapping, and the loss is that of Trainer, which would pass them by name.
        """
        if not isinstance(inputs, Mapping) and type(self).compute_loss is Trainer.compute_loss:
            raise ValueError(
                f"the batch is a {type(inputs).__name__}, and it must be a dict of tensors, such as input_ids and "
                "labels. Return one from the data collator, or write a compute_loss that takes it."
            )
        self._prove()
        step = f"training step {self.state.global_step + 1}"
        with advised(self), reported_failures(self.cp.groups.same_batch, step), self.accelerator.in_step():
            if self._scheduler is None:
                rows, length = _shape_of(inputs)
                self._count(rows * length, length)
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                loss = self._rounds(model, inputs, num_items_in_batch)
        if self._loss_watch is not None:
            self._loss_watch.see(loss)
        return loss

    def _rounds(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Run the rounds of a training step, and return the sum of their losses."""
        assert self._scheduler is not None
        rounds = self._step_state.rounds.pop(0) if self._step_state.rounds else self._scheduler.rounds([inputs])
        loss = torch.zeros((), device=self.args.device)
        sync = self.accelerator.gradient_state.sync_gradients
        try:
            for number, round in enumerate(rounds, start=1):
                last = not self._step_state.rounds and number == len(rounds)
                self.cp.switch(round.size)
                self._count(round.tokens, round.longest)
                self.accelerator.gradient_state._set_sync_gradients(sync and last)
                batch = dict(round.batch)
                if not self.model_accepts_loss_kwargs and self.compute_loss_func is None:
                    # The loss is the mean over batches of means over targets, and gradients a mean over all ranks.
                    batch[TARGET_WEIGHTS] = round.weights * (self._config.size / round.size)
                batch = moved(batch, self.args.device)
                with nullcontext() if last else self._without_reduction(model):
                    loss = loss + super().training_step(model, batch, num_items_in_batch)
        finally:
            self.cp.switch(self._config.size)
            self.accelerator.gradient_state._set_sync_gradients(sync)
        return loss

    def _without_reduction(self, model: torch.nn.Module) -> AbstractContextManager:
        """Return a context in which backward adds up gradients without reducing them over ranks."""
        if self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
            return nullcontext()
        if isinstance(self.model, FSDPModule) and hasattr(self, "_defer_fsdp_gradient_reduction"):
            return self._defer_fsdp_gradient_reduction()  # accelerate does not know of a model sharded while loading
        return self.accelerator.no_sync(model)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Generate completions, for trainers of TRL. The ranks of a group take those of its first rank."""
        return of_first_rank(super()._generate_single_turn(*args, **kwargs), self.cp.groups.same_batch)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a prediction step, which returns whole outputs on every rank."""
        self._prove()
        step = "a step of evaluation"
        with reported_failures(self.cp.groups.same_batch, step), self.accelerator.in_step():
            return super().prediction_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run an evaluation or a prediction."""
        with noted("an evaluation"):
            output = super().evaluation_loop(*args, **kwargs)
        self._step_state.evaluated = output.num_samples
        return output

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict, on every rank alike."""
        output = super().predict(*args, **kwargs)
        self._count_steps(output.metrics)
        return output

    def _count_steps(self, metrics: dict[str, float]) -> None:
        """Correct the steps per second of the evaluation that has just run."""
        samples, self._step_state.evaluated = self._step_state.evaluated, None
        if samples:
            ranks = self.args.world_size
            groups = ranks // self.cp.groups.same_batch.size
            count_steps(metrics, samples, self.args.eval_batch_size, groups, ranks)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Count the targets of the samples of all CP groups, each sample once.

        Without `average_tokens_across_devices`, it is the count of this rank's samples.
        """
        wanted = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        targets = [self._targets(batch) for batch in batch_samples] if wanted else []
        if not targets or any(labels is None for labels in targets):
            return None
        count = torch.stack([labels.ne(IGNORED).sum() for labels in targets]).sum().to(device)
        if self.uses_stock_loss:
            self._step_targets.add(count)
        if self.args.average_tokens_across_devices:
            return self.accelerator.gather(count).sum()
        return count

    @property
    def uses_stock_loss(self) -> bool:
        """True if the loss is that of the model, which leaves labels of -100 out."""
        package = str(self.compute_loss.__module__).split(".")[0]
        return self.compute_loss_func is None and package in ("transformers", "trl")

    def _targets(self, batch: Any) -> torch.Tensor | None:
        """Return the targets of a batch, or None if it has none that can be counted."""
        if not isinstance(batch, Mapping):
            return None
        labels, shifted = batch.get("labels"), batch.get("shift_labels")
        if shifted is None and isinstance(labels, torch.Tensor):
            # Labels of rows have no token to shift by.
            return labels[..., 1:] if self._loss_shifts_labels and labels.dim() > 1 else labels
        return shifted if isinstance(shifted, torch.Tensor) else None

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> float:
        """Compute this rank's share of the operations of the whole batch, since Trainer sums over ranks."""
        return super().floating_point_ops(inputs) / self.cp.groups.same_batch.size

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load random states, and then share them within each group.

        A checkpoint that fewer ranks wrote has random states for some of the ranks only.
        """
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self.cp.groups.same_batch.size > 1:
            share_streams(self.cp.groups.same_batch)

    def _finalize_training(self, *args: Any, **kwargs: Any):
        """Average the loss since the last log over ranks, because Trainer adds it to a total that is averaged.

        Raises:
            ValueError: on all ranks, if there was no step, or none with a target.
        """
        if self.state.global_step == 0 and self.state.max_steps > 0:
            raise agreed_error(
                "training ended after 0 steps, because the data set has given no batch. Look at what it yields, and "
                "at what filters drop.",
                world(),
            )
        self._check_targets(ended=True)
        self._tr_loss = gather(self._tr_loss).mean()
        return super()._finalize_training(*args, **kwargs)

    def _check_targets(self, ended: bool = False) -> None:
        self._step_targets.check(gather, self.state.global_step, ended)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._step_state.all_log = True
        if self.state.global_step == 1 or self.control.should_log:
            self._check_targets()
        try:
            with noted(f"logs, evaluation and saving after step {self.state.global_step}"):
                super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._step_state.all_log = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add throughput, sequence length and memory to the training loss that all ranks log.

        A user's own call adds nothing, since it may come from some ranks only.
        """
        if self._step_state.all_log and "loss" in logs:
            logs |= throughput(self._step_state, self._watch, self.accelerator.device)
            if self._scheduler is not None:
                logs["idle_share"] = round(self._scheduler.idle_share(), 6)
        self._count_steps(logs)
        super().log(logs, start_time)


class ContextParallelTrainer(ContextParallelMixin, Trainer):
    """Trainer of Transformers with `context_parallel=ContextParallelConfig(...)`. See `ContextParallelMixin`."""


def _shape_of(inputs: Any) -> tuple[int, int]:
    """Return rows and tokens of the inputs of a step, and zeros if they hold no tokens."""
    tokens = [inputs.get(name) for name in ("input_ids", "inputs_embeds")] if isinstance(inputs, Mapping) else []
    shapes = [tuple(x.shape[:2]) for x in tokens if isinstance(x, torch.Tensor) and x.dim() > 1]
    return shapes[0] if shapes else (0, 0)


class _SampleCheck(TrainerCallback):
    """Callback that looks for labels to learn, before training."""

    def __init__(self, trainer: ContextParallelMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs: Any):
        trainer = self._trainer
        with collective(world()):
            check_samples(
                trainer.train_dataset,
                trainer.data_collator,
                trainer.model,
                shifts=trainer._loss_shifts_labels,
                stock_loss=trainer.uses_stock_loss,
            )


class _Verification(TrainerCallback):
    """Callback that verifies the wrapped model before training, after the weights of a checkpoint are loaded."""

    def __init__(self, trainer: ContextParallelMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs: Any):
        verify(self._trainer.model_wrapped, self._trainer.cp)
        self._trainer._unproven = [model for model in self._trainer._unproven if model is not self._trainer.model]
