"""Watch over the loss of training: a run whose loss is not finite for some steps in a row ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed.agreement import agreed_error, gather_numbers, gather_objects
from ..distributed.mesh import world
from ..integration.checks.weights import non_finite, numbers_of, refuse_non_finite

logger = logging.getLogger(__name__)

NAMED = 3
"""Number of parameters that an error names."""


class LossWatch(TrainerCallback):
    """Callback that ends training after some optimizer steps in a row whose loss is NaN or infinite on any rank.

    The Trainer of Transformers hides such a loss: it logs the mean of earlier ones in its place
    (`logging_nan_inf_filter`). The flag of a step is read one step late, when the device has computed it.

    Args:
        steps: the number of steps.
        explain: a function that raises an error of its own if it knows why the loss is not finite. All ranks call it.
    """

    def __init__(self, steps: int, explain: Callable[[], None]):
        self._steps, self._explain = steps, explain
        self._reset()

    def _reset(self) -> None:
        self._broken: torch.Tensor | None = None
        """Flag for a loss of the present step that is not finite, on the device of the loss."""
        self._sent: tuple[int, torch.Tensor, Any] | None = None
        """Number of the step before, its flag on the host, and the event after which it is there."""
        self._since, self._row = 0, 0

    def see(self, loss: torch.Tensor) -> None:
        """Note the loss of a batch."""
        broken = ~loss.detach().isfinite().all()
        self._broken = broken if self._broken is None else self._broken | broken

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin at the first step, with weights that are finite.

        Raises:
            ValueError: on every rank alike, naming parameters that are not finite on any rank.
        """
        self._reset()
        model = kwargs.get("model")
        if model is not None:
            refuse_non_finite(numbers_of(model), world())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Share the flag of this step, and read that of the step before.

        Raises:
            ValueError: on every rank alike, if the loss was not finite for as many steps as it may.
        """
        self._read(args, kwargs.get("model"))
        ranks = world()
        flag = torch.zeros((), device=ranks.device) if self._broken is None else self._broken.float().to(ranks.device)
        self._broken = None
        if ranks.size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=ranks.group)
        event = None
        if flag.is_cuda:
            flag = torch.empty((), pin_memory=True).copy_(flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._sent = state.global_step, flag, event

    def is_broken(self, model: torch.nn.Module) -> bool:
        """Return whether the loss of the last step, or a weight after it, is not finite on any rank. All ranks ask."""
        if self._sent is not None:
            _, flag, event = self._sent
            if event is not None:
                event.synchronize()
            if flag:
                return True
        mine = any(map(non_finite, numbers_of(model).values()))
        return any(gather_numbers(world(), mine)[0])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the flag of the last step."""
        self._read(args, kwargs.get("model"))
        if self._row and state.is_world_process_zero:
            logger.warning(f"the loss is NaN or infinite since step {self._since}, the last {self._row} of this run.")

    def _read(self, args: TrainingArguments, model: torch.nn.Module | None) -> None:
        if self._sent is None:
            return
        step, flag, event = self._sent
        self._sent = None
        if event is not None:
            event.synchronize()
        if not flag:
            self._row = 0
            return
        self._since = self._since if self._row else step
        self._row += 1
        if self._row >= self._steps:
            self._explain()
            raise agreed_error(
                f"the loss is NaN or infinite since step {self._since}, for {self._row} steps in a row, so nothing is "
                f"learnt. {_state_of(model)} Look at the learning rate ({args.learning_rate:g}), at the dtype "
                "(float16 overflows where bfloat16 does not), and at the batch of that step, and train from a "
                "checkpoint of an earlier step. nan_steps in the ContextParallelConfig is the number of steps, and "
                "None goes on.",
                world(),
            )


def _state_of(model: torch.nn.Module | None) -> str:
    """Say which parameters are not finite on any rank, as a sentence. Every rank must call this."""
    named = list(numbers_of(model).items()) if model is not None else []
    mine = {name: count for name, parameter in named if (count := non_finite(parameter))}
    found = dict.fromkeys(name for each in gather_objects(mine, world()) for name in each)
    if not found:
        return "All weights are finite."
    names = ", ".join(name.removeprefix("module.") for name in list(found)[:NAMED])
    more = ", ..." * (len(found) > NAMED)
    return f"{len(found)} of {len(named)} parameters hold NaN or infinite weights: {names}{more}."
