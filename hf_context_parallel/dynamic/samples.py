"""Samples that dynamic CP deals to groups: documents cut out of batches, with their images, videos and sounds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..data.batch import AXES, CONSUMED, IGNORED, read_batch
from ..distributed.host import on_host
from ..integration.checks.agreement import SAMPLED
from ..planning.mask import Document
from .media import Media, MediaOfModel, Span

CARRIED = ("input_ids", "shift_labels", "position_ids")
"""Inputs of each sample that are sent to the ranks that compute it, as rows of a table `[rows, length]`.

With media, rows of positions on other axes follow, and rows of the types of tokens."""
NOT_GIVEN = -1
"""Type of the tokens of a sample whose batch has no types."""


class Sample(NamedTuple):
    """Document that is dealt to a group.

    Args:
        table: inputs of each token, `[rows, length]`.
        media: its images, videos and sounds by the names of inputs.
    """

    table: torch.Tensor
    media: Media

    @property
    def targets(self) -> int:
        """Number of targets."""
        return int((self.table[CARRIED.index("shift_labels")] != IGNORED).sum())


NO_BYTES = torch.empty(0, dtype=torch.uint8)
"""Bytes of no media."""


def bytes_of(media: Media) -> torch.Tensor:
    """Return media as bytes `[n]`, none if there are no media."""
    if not media:
        return NO_BYTES
    file = io.BytesIO()
    torch.save({name: x.clone(memory_format=torch.contiguous_format) for name, x in media.items()}, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def media_of(content: torch.Tensor) -> Media:
    """Return the media that `bytes_of` has made bytes of."""
    if not len(content):
        return {}
    media: Media = torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)
    return media


def compared(sample: Sample) -> dict[str, Any]:
    """Return what ranks compare of a sample: all tokens, and some values of its media."""
    found: dict[str, Any] = {"table": sample.table}
    for name, x in sample.media.items():
        found[name] = x.flatten()[:: max(1, x.numel() // SAMPLED)]
    return found


def cut(batch: Mapping[str, Any], media: MediaOfModel) -> list[Sample]:
    """Cut a batch into samples, which are its documents.

    Args:
        batch: a whole batch.
        media: the media that the model takes.

    Raises:
        ValueError: if the batch cannot be cut into samples without a change to its loss.
    """
    given = {name: x for name, x in batch.items() if x is not None} if isinstance(batch, Mapping) else batch
    own = (*media.names, *media.types)
    text = {name: x for name, x in given.items() if name not in own} if isinstance(given, Mapping) else given
    text, rows, whole = read_batch(text)
    for name in text:
        if name not in (*CARRIED, "labels", *CONSUMED):
            carried = ", ".join((*CARRIED, *own))
            raise ValueError(
                f"the batch has {name!r}, and with dynamic=True samples are dealt to groups with {carried} alone. "
                "Leave it out, or set dynamic=False."
            )
    if AXES in whole and not media.axes:
        raise ValueError(
            f"position_ids has positions on {whole[AXES].shape[-1]} axes, and with dynamic=True samples are dealt "
            "with those in the text alone. Leave them out, or set dynamic=False."
        )
    if "shift_labels" not in whole:
        raise ValueError("the batch has no labels, and dynamic=True divides losses by their count. Add labels.")
    spans = _spans(rows, padded="attention_mask" in text)
    table = torch.stack([whole[name].long() for name in CARRIED])
    types = {name: on_host(given[name]) for name in media.types if given.get(name) is not None}
    samples = []
    for (row, start, stop), content in zip(spans, media.cut(given, table[0], spans)):
        part = table[:, row, start:stop]
        ids, own_types = part[0], {name: x[row, start:stop].long() for name, x in types.items()}
        if content and not torch.equal(part[CARRIED.index("position_ids")], torch.arange(len(ids))):
            raise ValueError(
                f"row {row} has media, and the position_ids of a document do not count from 0. With dynamic=True they "
                "tell documents. Leave them out, or set dynamic=False."
            )
        more = []
        if AXES in whole:
            more.append(whole[AXES][row, start:stop, -media.axes :].T.long())
        elif media.axes and "position_ids" in text:
            more.append(part[CARRIED.index("position_ids")].expand(media.axes, -1))
        elif media.axes:
            more.append(media.positions(ids, own_types, content))
        more += [own_types.get(name, torch.full_like(ids, NOT_GIVEN))[None] for name in media.types]
        samples.append(Sample(torch.cat([part, *more]), content))
    return samples


def _spans(rows: Sequence[Sequence[Document]], padded: bool) -> list[Span]:
    """List the documents of all rows: their row, first token, and the token after the last.

    Raises:
        ValueError: if there is padding before a document or within it.
    """
    found = []
    for number, documents in enumerate(rows):
        for (start, stop), *others in documents:
            if others or (padded and start):
                raise ValueError(
                    f"row {number} has padding before or between its tokens, which dynamic=True cannot cut off. Pack "
                    "rows or pad them on the right (padding_side='right'), or set dynamic=False."
                )
            found.append((number, start, stop))
    return found
