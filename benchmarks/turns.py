"""Runs that are measured in turns, so that a slow moment of the machine meets them all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any


def timed(
    run: Callable[[], Any], before: Callable[[], Any] | None = None, after: Callable[[], Any] | None = None
) -> Callable[[], float]:
    """Return a function that runs `run` and returns its seconds.

    Args:
        before: is called before the time is taken, such as a barrier.
        after: is called before the time is taken again.
    """

    def measure() -> float:
        if before is not None:
            before()
        begin = time.perf_counter()
        run()
        if after is not None:
            after()
        return time.perf_counter() - begin

    return measure


def in_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each measure once a round, in another order each time, which is the same on all ranks.

    Returns:
        What each measure returned in each round.
    """
    found: dict[str, list[float]] = {name: [] for name in measures}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(measures), len(measures)):
            found[name].append(measures[name]())
    return found
