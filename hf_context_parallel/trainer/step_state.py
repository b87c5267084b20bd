"""State that the mixin keeps between the methods of a training step."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..dynamic.scheduler import Round


@dataclass
class StepState:
    """State of the present step, and counts since the last log.

    Args:
        all_log: True while all ranks log together.
        rounds: with `dynamic`, the rounds of each training step until the next optimizer step.
        tokens: this rank's share of the tokens since the last log.
        longest: tokens of the longest row since the last log.
        running: tokens that a CP group computes at present, and the ranks of it.
        evaluated: number of samples of an evaluation whose speed is about to be logged.
    """

    all_log: bool = False
    rounds: list[list[Round]] = field(default_factory=list)
    tokens: float = 0.0
    longest: int = 0
    running: tuple[int, int] = (0, 1)
    evaluated: int | None = None

    def count(self, tokens: float, longest: int) -> None:
        """Add tokens to the counts, and update the longest row."""
        self.tokens += tokens
        self.longest = max(self.longest, longest)

    def read_counts(self) -> tuple[float, int]:
        """Return tokens and longest row since the last read, and reset them."""
        counts = self.tokens, self.longest
        self.tokens, self.longest = 0.0, 0
        return counts
