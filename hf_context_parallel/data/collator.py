"""A collator that yields one rank's share of each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config import ContextParallelConfig
from .shard import shard_batch


class ContextParallelDataCollator:
    """A collator whose batches are one rank's share of what another collator yields.

    Args:
        collator: any callable that makes a whole batch (a dict of tensors) of a list of samples, or a tokenizer, which
            then pads them.
        config: the CP settings.
        rank: of the CP group; `cp.rank`.

    What it yields is for `cp.shard`, and says that it is sharded. All ranks of a CP group must collate the same
    samples: see `ContextParallel.prepare_data_loader`.
    """

    def __init__(self, collator: Callable[[list], Mapping[str, Any]], config: ContextParallelConfig, rank: int):
        if hasattr(collator, "pad") and not hasattr(collator, "tokenizer"):  # a tokenizer
            from transformers import DataCollatorWithPadding

            collator = DataCollatorWithPadding(collator)
        if not 0 <= rank < config.size:
            raise ValueError(f"rank={rank} is outside a CP group of size={config.size}; give it cp.rank.")
        self.collator = collator
        self.config = config
        self.rank = rank

    def __call__(self, samples: list) -> dict[str, Any]:
        """The share of this rank of the batch of `samples`."""
        return shard_batch(self.collator(samples), self.config, self.rank)
