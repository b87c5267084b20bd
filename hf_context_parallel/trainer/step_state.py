"""What the mixin remembers between the methods of the Trainer that it extends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..dynamic.scheduler import Round


@dataclass
class StepState:
    """The step that is running, and what was computed since the last log.

    Args:
        predicting: the inputs have been sharded by `prediction_step`.
        whole_num_items: targets of the whole batch that is predicted.
        loss_is_ours: the step has called the mixin's `compute_loss`.
        all_log: all ranks are logging, not one of them on its own.
        rounds: those of each training step until the next optimizer step, with `dynamic`.
        tokens, longest: this rank's share of the tokens, and the longest row.
    """

    predicting: bool = False
    whole_num_items: torch.Tensor | int | None = None
    loss_is_ours: bool = False
    all_log: bool = False
    rounds: list[list[Round]] = field(default_factory=list)
    tokens: float = 0.0
    longest: int = 0

    def count(self, tokens: float, longest: int) -> None:
        """Add to what was computed."""
        self.tokens += tokens
        self.longest = max(self.longest, longest)

    def read_counts(self) -> tuple[float, int]:
        """What was computed since this was last read."""
        counts = self.tokens, self.longest
        self.tokens, self.longest = 0.0, 0
        return counts
