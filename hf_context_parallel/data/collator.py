"""Collator that yields one rank's shard of each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config import ContextParallelConfig
from .shard import shard_batch


class ContextParallelDataCollator:
    """Collator that shards the batches of another collator for one rank.

    `cp.shard` recognises the batches as sharded. All ranks of a CP group must collate the same samples: see
    `ContextParallel.prepare_data_loader`.

    Args:
        collator: a callable that makes a whole batch (a dict of tensors) from a list of samples. A tokenizer is taken
            too, and pads the samples.
        config: the CP settings.
        rank: this process's rank in the CP group, `cp.rank`.

    Raises:
        ValueError: if `rank` is not a rank of a group of `config.size`.
    """

    def __init__(self, collator: Callable[[list], Mapping[str, Any]], config: ContextParallelConfig, rank: int):
        if hasattr(collator, "pad") and not hasattr(collator, "tokenizer"):  # a tokenizer
            from transformers import DataCollatorWithPadding

            collator = DataCollatorWithPadding(collator)
        if not 0 <= rank < config.size:
            raise ValueError(f"rank={rank} is outside a CP group of size={config.size}. Give cp.rank.")
        self.collator = collator
        self.config = config
        self.rank = rank

    def __call__(self, samples: list) -> dict[str, Any]:
        """Collate `samples` and return this rank's shard of the batch."""
        return shard_batch(self.collator(samples), self.config, self.rank)
