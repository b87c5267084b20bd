"""Saving of checkpoints by a Trainer: each is whole or not there, on all ranks alike."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer

from ..compat import lookup
from ..distributed.agreement import agreed_error, collective, of_first_rank
from ..distributed.mesh import world
from .checkpoints import (
    PREFIX_CHECKPOINT_DIR,
    SAVING,
    TRAINER_STATE_NAME,
    clear,
    flush,
    half_ones_of,
    publish,
    replaced_whole,
)

logger = logging.getLogger(__name__)

CONTINUE = "continue"
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError, CheckpointException)
"""Errors of writing a file. A `RuntimeError` is one if it is of PyTorch's writer."""
WRITERS = ("PytorchStreamWriter", "inline_container")
"""Names in the errors of PyTorch's writer."""


class _NotSaved(ValueError):
    """No checkpoint on any rank, since one of them could not write. All ranks raise it."""


class CheckpointSaving:
    """Saving of the checkpoints of a Trainer.

    A checkpoint is written into `SAVING`, in the folder of the run. When all ranks are done and all files are on the
    disk, it is renamed to be marked as whole, and then moved. A rank that cannot write goes on to where the ranks
    agree, since others wait for it on the way.

    Args:
        trainer: the Trainer. Its `_get_output_dir` and `_save` ask this object.
        on_error: `"raise"`, or `"continue"` to train on without a checkpoint that cannot be written.

    Attributes:
        folder: the folder in place of that of the run while a checkpoint is written, otherwise None.
    """

    def __init__(self, trainer: Trainer, on_error: str):
        self._trainer, self._on_error = trainer, on_error
        self.folder: str | None = None
        self._error: BaseException | None = None

    def save(self, run_dir: str, write: Callable[[], None]) -> str | None:
        """Save a checkpoint, and remove those that are too many. All ranks call this.

        Args:
            run_dir: the folder of the run.
            write: writes the checkpoint, into the folder that `_get_output_dir` returns then.

        Returns:
            The folder of the checkpoint, or None if it could not be written and the run goes on.

        Raises:
            ValueError: on every rank, if it could not be written, with its path, and the bytes that it takes.
        """
        state, best = self._trainer.state, self._trainer.state.best_model_checkpoint
        run_dir = of_first_rank(run_dir, world())  # in a search for hyperparameters, only the first rank has the trial
        final = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        staged = Path(run_dir, SAVING, Path(final).name)
        try:
            self._together(final, lambda: self._make_room(staged))
            with self._into(str(staged.parent)):
                write()
            with self._kept_errors():
                self._name_best(run_dir, staged)
            self._together(final, lambda: self._flush(staged))
            self._together(final, lambda: publish(staged) if self._is_first_of_machine else None)
        except _NotSaved as error:
            state.best_model_checkpoint = best
            if self._is_first_of_machine:
                shutil.rmtree(staged, ignore_errors=True)
            if self._on_error != CONTINUE:
                text = f"{error} Make room, or train on without it: on_save_error='continue'."
                raise agreed_error(text, world()) from None
            if self._trainer.is_world_process_zero():
                logger.warning("%s The run goes on without it.", error)
            return None
        with suppress(OSError):  # another machine that shares the disk has removed it
            staged.parent.rmdir()
        self._rotate(run_dir)
        return final

    @contextmanager
    def writing_model(self, folder: str) -> Iterator[str]:
        """Yield the folder to write a model into. It is another one at first, unless a checkpoint is written."""
        if self.folder is not None:
            with self._kept_errors():
                yield folder
        elif self._trainer.args.should_save:
            with replaced_whole(folder) as staged:
                yield staged
        else:
            yield folder

    @property
    def _is_first_of_machine(self) -> bool:
        return self._trainer.args.local_process_index == 0

    def _together(self, final: str, action: Callable[[], None]) -> None:
        """Run an action on every rank.

        Raises:
            _NotSaved: on every rank, if it raised on any.
        """
        try:
            with collective(world()):
                try:
                    action()
                except WRITE_ERRORS as error:
                    raise ValueError(self._described(final, error)) from error
        except ValueError as error:
            raise _NotSaved(str(error)) from None

    def _described(self, final: str, error: BaseException) -> str:
        try:
            free = f"{shutil.disk_usage(Path(final).parent).free:,}"
        except OSError:
            free = "no"
        return (
            f"{final} was not saved ({type(error).__name__}: {error}). It takes {bytes_of(self._trainer):,} bytes or "
            f"more, and {free} bytes are free."
        )

    def _make_room(self, staged: Path) -> None:
        """Make the folder to write into, and look whether the checkpoint fits onto the disk."""
        run_dir, self._error = staged.parent.parent, None
        if not self._is_first_of_machine:
            return
        clear(run_dir)
        staged.mkdir(parents=True, exist_ok=True)
        args, needed = self._trainer.args, bytes_of(self._trainer)
        if self._is_sharded:
            needed //= max(1, args.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)))
        elif not args.should_save:
            return
        if needed > shutil.disk_usage(run_dir).free:
            raise OSError("the disk is too small")

    @property
    def _is_sharded(self) -> bool:
        """True if each rank may write a part of the checkpoint."""
        return self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled

    @contextmanager
    def _into(self, folder: str) -> Iterator[None]:
        """Let the Trainer write into a folder, and keep errors of writing."""
        self.folder = folder
        try:
            with self._kept_errors(), _replaced_save(self._kept_errors):
                yield
        finally:
            self.folder = None

    @contextmanager
    def _kept_errors(self) -> Iterator[None]:
        """Keep an error of writing in this block for the ranks to agree on."""
        try:
            yield
        except WRITE_ERRORS as error:
            if isinstance(error, RuntimeError) and not any(name in str(error) for name in WRITERS):
                raise
            self._error = self._error or error

    def _name_best(self, run_dir: str, staged: Path) -> None:
        """Name the best checkpoint as it will be called, in the state of the Trainer and in its file."""
        state = self._trainer.state
        if not state.best_global_step:
            return
        best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if state.best_global_step == state.global_step or os.path.isdir(best):
            state.best_model_checkpoint = best
        if self._trainer.args.should_save and self._error is None:
            state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _flush(self, staged: Path) -> None:
        if self._error is not None:
            raise self._error
        if self._is_first_of_machine:
            flush(staged)

    def _rotate(self, run_dir: str) -> None:
        """Remove the checkpoints that are too many. Half ones of other programs do not count."""
        limit = self._trainer.args.save_total_limit
        if self._trainer.args.should_save and limit is not None and limit > 0:
            rotate = lookup("transformers.trainer_utils", "rotate_checkpoints", "save_total_limit")
            rotate(
                output_dir=run_dir,
                save_total_limit=limit + len(half_ones_of(Path(run_dir))),
                best_model_checkpoint=self._trainer.state.best_model_checkpoint,
                use_mtime=True,
            )


@contextmanager
def _replaced_save(kept_errors: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Let `torch.save` keep its errors. Between two calls of it, ranks of sharded models wait for each other."""
    save = torch.save

    def keeping(*args: Any, **kwargs: Any) -> None:
        with kept_errors():
            save(*args, **kwargs)

    torch.save = keeping
    try:
        yield
    finally:
        torch.save = save


def bytes_of(trainer: Trainer) -> int:
    """Count the bytes of weights and optimizer state that a checkpoint holds at least."""
    adapters_alone = hasattr(trainer.model, "peft_config")
    weights = sum(
        getattr(weight, "ds_numel", weight.numel()) * weight.element_size()
        for weight in trainer.model.parameters()
        if weight.requires_grad or not adapters_alone
    )
    if trainer.args.save_only_model or trainer.is_deepspeed_enabled:
        return weights
    states = getattr(trainer.optimizer, "state", {}).values()
    kept = (value for state in states if isinstance(state, dict) for value in state.values())
    return weights + sum(value.numel() * value.element_size() for value in kept if isinstance(value, torch.Tensor))
