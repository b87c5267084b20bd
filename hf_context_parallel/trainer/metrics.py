"""Throughput and peak memory of training steps, for the logs."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .memory import PeakMemory
from .step_state import StepState


class StepWatch(TrainerCallback):
    """Callback that measures the time and the peak memory of training steps between two reads."""

    def __init__(self, device: torch.device):
        self._memory = PeakMemory(device)
        self._highest: float | None = None
        self._since = time.perf_counter()

    def read(self) -> tuple[float, float | None]:
        """Return the seconds since the last read, and the largest peak memory of a step above its start.

        The memory is in GiB, or None if it cannot be measured.
        """
        seconds, highest = time.perf_counter() - self._since, self._highest
        self._since, self._highest = time.perf_counter(), None
        return seconds, highest

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.read()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._memory.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        peak = self._memory.peak()
        if peak is not None:
            self._highest = max(peak, self._highest or 0.0)


def count_steps(metrics: dict[str, float], samples: int, batch_size: int, groups: int, ranks: int) -> None:
    """Correct the steps per second of an evaluation in place: Trainer takes each rank for one with its own samples.

    Args:
        samples: number of samples of the evaluation.
        batch_size: samples of a step in a group.
        groups, ranks: number of CP groups, and of all ranks.
    """
    steps, counted = (math.ceil(samples / (batch_size * processes)) for processes in (groups, ranks))
    for name in metrics:
        if name.endswith("_steps_per_second"):
            metrics[name] = round(metrics[name] * steps / counted, 3)


def throughput(step: StepState, watch: StepWatch, device: torch.device) -> dict[str, float]:
    """Compute throughput, sequence length and peak memory of all ranks since the last call. All ranks call it."""
    seconds, peak = watch.read()
    mine = [*step.read_counts(), -1.0 if peak is None else peak]
    gathered = gather(torch.tensor([mine], dtype=torch.float64, device=device))
    tokens, longest, peaks = gathered.T
    figures = {}
    if longest.max() > 0:  # a trainer that generates gets no tokens but makes them
        figures = {
            "tokens_per_second": tokens.sum().item() / seconds,
            "tokens_per_second_per_rank": tokens.mean().item() / seconds,
            "sequence_length": int(longest.max()),
        }
    if peaks.max() >= 0:
        figures["peak_memory_gib"] = peaks.max().item()
    return figures
