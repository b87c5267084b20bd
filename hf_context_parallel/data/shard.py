"""From a whole batch to one rank's share of it: shift labels, find documents, pad, shard.

Everything here is integers on the host. There are no process groups and no collectives, so a collator can do it in a
worker process.
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
from ..planning import mask as masks
from ..planning.balanced import padded_layout
from ..planning.layout import Layout
from .batch import IGNORED, PADDING, PASSED_ON, SHARD, read_batch, take_columns


@dataclass(frozen=True)
class Shard:
    """What a sharded batch knows of the whole. It pickles.

    Args:
        batch_size, length: rows of the batch, and tokens a row.
        layout: where each token lives, once rows are padded to a length that the layout deals out equally.
        rank: whose share it is.
        rows: the documents of each row.
        positioned: whether the batch brought its own position_ids.
        packed: whether rows hold several documents, rather than one and padding.
        fingerprint: of the whole batch; of its shape and documents alone where contents are not compared.
        lengths: `[B, S_local]`, for each token one more than the largest position of its document where rows are
            packed, else of the batch.
        all_lengths: those of all ranks' tokens.
        has_targets: whether the batch has labels.
        typed: whether a token of it is of another type than 0, as an image's are.
        begins: the greatest common divisor of the positions at which packed documents begin.
        unshifted: this rank's labels as they came, for models that compare each token with its own, and
        unshifted_count: how many the batch has. None without labels.
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
        """Rows, and this rank's tokens of each."""
        return self.batch_size, self.layout.local_length(self.rank)

    @cached_property
    def padding(self) -> torch.Tensor | None:
        """`[B, length]`, 0 at padding; None if there is none."""
        if self.packed or all(row == (((0, self.length),),) for row in self.rows):
            return None
        padding = torch.zeros(self.batch_size, self.length, dtype=torch.long)
        for row, documents in enumerate(self.rows):
            for document in documents:
                for start, stop in document:
                    padding[row, start:stop] = 1
        return padding

    def mask(self, pattern: masks.Pattern) -> masks.Mask:
        """What is seen in layers of this pattern."""
        return masks.Mask(self.layout.length, self.rows, pattern)


def shard_batch(batch: Mapping[str, Any], config: ContextParallelConfig, rank: int) -> dict[str, Any]:
    """This rank's share of a batch, ready for the model, with its `Shard` under the key `SHARD`.

    Args:
        batch: what one process would give the model: `input_ids` (or `inputs_embeds`) of `[B, S]`, and any of
            `attention_mask` (2-D padding), `position_ids`, `labels`, `shift_labels`, `token_type_ids`,
            `cu_seq_lens_q` (with B = 1), `num_items_in_batch`. Positions that it lacks count from the row's first
            token, with `cu_seq_lens_q` from the document's.
        rank: of `config.size` ranks.

    Returns:
        The inputs with a sequence dimension as `[B, S_local]`; `shift_labels` (and `labels`, without which a model
        computes no loss), `position_ids`, `use_cache=False`, and the whole batch's count of valid targets as
        `num_items_in_batch`, unless the batch brings its own.

    Raises:
        ValueError: if the batch holds something that cannot be exact on a shard.
    """
    batch, rows, whole = read_batch(batch)
    batch_size, length = whole["position_ids"].shape
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    num_items = (whole["shift_labels"] != IGNORED).sum() if "shift_labels" in whole else None

    documents = [document for row in rows for document in row]
    layout = padded_layout(config.layout, length, config.size, documents)
    positions = layout.positions(rank).to(tokens.device)
    local = {name: batch[name] for name in PASSED_ON if name in batch}
    local |= {name: take_columns(value, positions, layout.length, PADDING[name]) for name, value in whole.items()}
    if "labels" in local:
        local["labels"] = local["shift_labels"]  # one tensor, so that nobody has to compare the two
    local["use_cache"] = False
    if num_items is not None:
        local.setdefault("num_items_in_batch", num_items)
    packed = "attention_mask" not in batch and any(len(row) > 1 for row in rows)
    reach = _reach(whole["position_ids"].cpu(), rows, packed)
    lengths = take_columns(reach, layout.positions(rank), layout.length, int(reach.max()))
    unshifted, count = None, None
    if "labels" in batch:
        unshifted = take_columns(batch["labels"], positions, layout.length, IGNORED)
        count = (batch["labels"] != IGNORED).sum()
    # Ranks whose plans differ would wait for each other, so what plans are made of is always compared.
    planned = {"planned": (config.layout, batch_size, length, rows)}
    mark = fingerprint({**batch, **planned} if config.check_batch else planned)
    types = whole.get("token_type_ids")
    local[SHARD] = Shard(
        batch_size=batch_size,
        length=length,
        layout=layout,
        rank=rank,
        rows=rows,
        positioned="position_ids" in batch,
        packed=packed,
        fingerprint=mark,
        lengths=lengths,
        all_lengths=tuple(reach.unique().tolist()),
        has_targets=num_items is not None,
        typed=types is not None and bool(types.any()),
        begins=_begins(whole["position_ids"].cpu(), rows) if packed else 0,
        unshifted=unshifted,
        unshifted_count=count,
    )
    return local


def _reach(position_ids: torch.Tensor, rows: tuple[tuple[masks.Document, ...], ...], packed: bool) -> torch.Tensor:
    """For each token one more than the largest position that its frequencies may depend on."""
    reach = (position_ids.max() + 1).expand(position_ids.shape).clone()
    if packed:
        for row, documents in enumerate(rows):
            for document in documents:
                start, stop = document[0][0], document[-1][1]
                reach[row, start:stop] = position_ids[row, start:stop].max() + 1
    return reach


def _begins(position_ids: torch.Tensor, rows: tuple[tuple[masks.Document, ...], ...]) -> int:
    """The greatest common divisor of the positions of documents' first tokens; 0 if all are 0."""
    return gcd(
        *(int(position_ids[row, document[0][0]]) for row, documents in enumerate(rows) for document in documents)
    )
