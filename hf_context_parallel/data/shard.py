"""Sharding of a whole batch for one rank: shift labels, find documents, pad, take the rank's tokens.

This needs neither process groups nor collectives, so a collator can shard in a worker process of a data loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd
from typing import Any

import torch

from ..config import ContextParallelConfig
from ..distributed.agreement import fingerprint
from ..distributed.host import beside
from ..planning import mask as masks
from ..planning.balanced import padded_layout
from ..planning.layout import Layout
from .batch import AXES, IGNORED, PADDING, PASSED_ON, SHARD, read_batch, take_columns


@dataclass(frozen=True)
class Shard:
    """Description of the whole batch that a shard of it carries. It can be pickled.

    Args:
        batch_size, length: rows of the whole batch, and tokens per row.
        layout: the rank of each token, after rows are padded to a length that all ranks share equally.
        rank: the rank that holds the shard.
        rows: the documents of each row.
        positioned: True if the batch came with position_ids.
        packed: True if a row holds several documents. Otherwise a row is one document and padding.
        fingerprint: a hash of the whole batch; of its shape and documents alone if contents are not compared.
        lengths: `[B, S_local]`, for each token the largest position of its document, plus one. If rows are not packed,
            it is the largest position of the batch, plus one.
        all_lengths: the distinct values of `lengths` on all ranks.
        has_targets: True if the batch has labels.
        typed: True if a token of the batch has a token type other than 0, as the tokens of an image have.
        begins: the greatest common divisor of the positions at which packed documents begin.
        unshifted: this rank's labels before shifting, for models that compare each token with its own label. None
            if the batch has no `labels`.
        unshifted_count: the number of valid labels of the whole batch before shifting, or None.
    """

    batch_size: int
    length: int
    layout: Layout
    rank: int
    rows: tuple[tuple[masks.Document, ...], ...]
    positioned: bool
    packed: bool
    fingerprint: int
    lengths: torch.Tensor = field(compare=False)
    all_lengths: tuple[int, ...]
    has_targets: bool
    typed: bool
    begins: int
    unshifted: torch.Tensor | None = field(default=None, compare=False)
    unshifted_count: torch.Tensor | None = field(default=None, compare=False)

    @property
    def local_shape(self) -> tuple[int, int]:
        """Shape `(B, S_local)` of this rank's tokens."""
        return self.batch_size, self.layout.local_length(self.rank)

    @cached_property
    def padding(self) -> torch.Tensor | None:
        """Padding mask `[B, length]`, 0 at padding, or None if there is no padding."""
        if self.packed or all(row == (((0, self.length),),) for row in self.rows):
            return None
        padding = torch.zeros(self.batch_size, self.length, dtype=torch.long)
        for row, documents in enumerate(self.rows):
            for document in documents:
                for start, stop in document:
                    padding[row, start:stop] = 1
        return padding

    def mask(self, pattern: masks.Pattern) -> masks.Mask:
        """Build the mask of the layers that have this pattern."""
        return masks.Mask(self.layout.length, self.rows, pattern)


def shard_batch(batch: Mapping[str, Any], config: ContextParallelConfig, rank: int) -> dict[str, Any]:
    """Shard a whole batch for one rank.

    Args:
        batch: the inputs that one process would give the model: `input_ids` of `[B, S]` or `inputs_embeds` of
            `[B, S, hidden]`, and any of `attention_mask` (2-D padding), `position_ids`, `labels`, `shift_labels`,
            `token_type_ids`, `cu_seq_lens_q` (with B = 1), `num_items_in_batch`. Without `position_ids`, positions
            count from the first token of the row, and with `cu_seq_lens_q` from the first token of the document.
        config: the CP settings.
        rank: one of the `config.size` ranks.

    Returns:
        The inputs of the model for this rank. Those with a sequence dimension are `[B, S_local]`, `position_ids`
        among them. With labels there are `shift_labels`, `labels` (without which a model computes no loss) and
        `num_items_in_batch`, which is the whole batch's count of valid targets unless the batch gives another.
        `use_cache` is False. The `Shard` is under the key `SHARD`.

    Raises:
        ValueError: if the batch holds an input that cannot be exact on a shard.
    """
    given = batch
    batch, rows, whole = read_batch(given)
    tokens = given["input_ids" if "input_ids" in batch else "inputs_embeds"]
    batch_size, length = whole["position_ids"].shape
    num_items = (whole["shift_labels"] != IGNORED).sum() if "shift_labels" in whole else None

    documents = [document for row in rows for document in row]
    layout = padded_layout(config.layout, length, config.size, documents, config.max_tokens_per_rank)
    positions = layout.positions(rank)
    local = {name: batch[name] for name in PASSED_ON if name in batch}
    for name, value in whole.items():
        local[name] = beside(take_columns(value, positions, layout.length, PADDING[name]), tokens)
    if AXES in local:
        local["position_ids"] = local.pop(AXES).permute(2, 0, 1)
    if "labels" in local:
        local["labels"] = local["shift_labels"]  # the same tensor, so that no check has to compare values
    local["use_cache"] = False
    if num_items is not None:
        local.setdefault("num_items_in_batch", beside(num_items, tokens))
    packed = "attention_mask" not in batch and any(len(row) > 1 for row in rows)
    largest = whole[AXES].amax(-1) if AXES in whole else whole["position_ids"]
    reach, all_lengths = _reach(largest, rows, packed)
    lengths = take_columns(reach, positions, layout.length, all_lengths[-1])
    unshifted, count = None, None
    if "labels" in batch:
        unshifted = take_columns(batch["labels"], positions, layout.length, IGNORED)
        count = (batch["labels"] != IGNORED).sum()
    # Ranks with different plans would wait for each other forever, so the inputs of the plan are always compared.
    planned = {"planned": (layout, batch_size, length, rows)}
    mark = fingerprint({**batch, **planned} if config.check_batch else planned)
    types = whole.get("token_type_ids")
    local[SHARD] = Shard(
        batch_size=batch_size,
        length=length,
        layout=layout,
        rank=rank,
        rows=rows,
        positioned="position_ids" in batch or AXES in whole,
        packed=packed,
        fingerprint=mark,
        lengths=lengths,
        all_lengths=all_lengths,
        has_targets=num_items is not None,
        typed=types is not None and bool(types.any()),
        begins=_begins(whole["position_ids"], rows) if packed else 0,
        unshifted=unshifted,
        unshifted_count=count,
    )
    return local


def _reach(
    position_ids: torch.Tensor, rows: tuple[tuple[masks.Document, ...], ...], packed: bool
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Compute for each token the largest position that its RoPE frequencies may depend on, plus one.

    Returns:
        `[B, S]`, and its distinct values, ascending.
    """
    if not packed:
        largest = position_ids.max() + 1
        return largest.expand(position_ids.shape), (int(largest),)
    reach, distinct = torch.empty_like(position_ids), set()
    for row, documents in enumerate(rows):
        begins = torch.zeros(position_ids.shape[1], dtype=torch.long)
        begins[[start for (start, _), *_ in documents if start]] = 1  # packed documents have no gaps between them
        numbers = begins.cumsum(0)
        ends = position_ids.new_zeros(len(documents))
        ends = ends.scatter_reduce(0, numbers, position_ids[row], "amax", include_self=False) + 1
        reach[row] = ends[numbers]
        distinct |= set(ends.tolist())
    return reach, tuple(sorted(distinct))


def _begins(position_ids: torch.Tensor, rows: tuple[tuple[masks.Document, ...], ...]) -> int:
    """Compute the greatest common divisor of the positions of all documents' first tokens; 0 if all are 0."""
    firsts = (position_ids[row, [document[0][0] for document in documents]] for row, documents in enumerate(rows))
    return gcd(*torch.cat(list(firsts)).unique().tolist())
