"""The batches that a model is verified with: documents in a row, and rows with padding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ...context_parallel import ContextParallel
from ...integration.model_registry import transformers_model
from ...integration.tensor_parallel.sequence_parallel import Shares
from ...planning import mask as masks
from ...planning.balanced import padded_layout

TOKENS_A_RANK = 16
"""Of a row, at least."""
LONGEST = 1024
"""Tokens of a row that is made long for the sake of a window."""
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention", "attention_window_size")
"""The fields of configurations that limit how far attention reaches."""


@dataclass
class Batch:
    """A batch as one process would give it to the model, and which of its tokens are this rank's.

    Args:
        kind: what it is called.
        inputs: of `[B, S]`.
        pieces: the columns that one process would give the model at a time: documents, or all.
        real: `[B, S]`, False at padding.
        columns: `[S_local]`, those of this rank; with sequence parallelism, its share of the shard's.
    """

    kind: str
    inputs: dict[str, torch.Tensor]
    pieces: list[slice]
    real: torch.Tensor
    columns: torch.Tensor
    _drawn: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def draw(self, like: torch.Tensor, piece: slice, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Random numbers for each token of a piece, the same in every call; of some columns of the piece if given.

        They are 0 at padding, whose outputs mean nothing.

        Args:
            like: `[B, S, ...]`, of the shape, dtype and device wanted.
        """
        shape = (*self.real.shape, *like.shape[2:])
        if shape not in self._drawn:
            numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            self._drawn[shape] = numbers * self.real.view(*self.real.shape, *[1] * (like.dim() - 2))
        numbers = self._drawn[shape][:, piece]
        return (numbers if columns is None else numbers[:, columns]).to(like)

    def mine(self, piece: slice) -> torch.Tensor:
        """The columns of a piece that are this rank's, counted from its first."""
        inside = (self.columns >= piece.start) & (self.columns < piece.stop)
        return self.columns[inside] - piece.start


def make_batches(model: torch.nn.Module, cp: ContextParallel) -> list[Batch]:
    """Several documents in a row; and two shorter rows with padding, one on the left and one on the right."""
    inner = transformers_model(model)
    device = next(inner.parameters()).device
    device = cp.groups.device if device.type == "meta" else device  # offloaded, and moved when they are used
    short, long = _lengths(inner, cp)

    odd = long // 4 | 1
    documents = [slice(0, odd), slice(odd, odd + 1), slice(odd + 1, long)]
    position_ids = torch.cat([torch.arange(document.stop - document.start) for document in documents])[None]
    mask = torch.ones(2, short, dtype=torch.long)
    mask[0, : short // 8 | 1] = mask[1, -(short // 5 | 1) :] = 0
    packed = {"input_ids": _tokens(inner, 1, long), "position_ids": position_ids}
    padded = {"input_ids": _tokens(inner, 2, short), "attention_mask": mask}
    batches = []
    for kind, inputs, pieces, real, rows in (
        ("packed", packed, documents, torch.ones(1, long), masks.from_position_ids(position_ids)),
        ("padded", padded, [slice(0, short)], mask, masks.from_attention_mask(mask)),
    ):
        dealt = [document for row in rows for document in row]
        columns = padded_layout(cp.config.layout, real.shape[1], cp.size, dealt).positions(cp.rank)
        if cp.config.sequence_parallel:  # of which layers and mixers see a share
            columns = columns[Shares(cp.groups.tensor, len(columns)).mine]
        inputs = {name: value.to(device) for name, value in inputs.items()}
        batches.append(Batch(kind, inputs, pieces, real.bool(), columns))
    return batches


def _lengths(model: PreTrainedModel, cp: ContextParallel) -> tuple[int, int]:
    """Tokens of a row of which all ranks have some, and of one that the longest window that fits is half of."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in WINDOWS]
    doubled = [2 * window for window in windows if isinstance(window, int) and 0 < 2 * window <= LONGEST]
    # So that all layouts deal rows as short as these, and sequence parallelism shards, without padding them.
    step = 2 * cp.size * (cp.groups.tensor.size if cp.config.sequence_parallel else 1)
    most = getattr(config, "max_position_embeddings", None) or LONGEST
    short = -(-TOKENS_A_RANK * cp.size // step) * step
    long = max([short, *(-(-window // step) * step for window in doubled)])
    return tuple(max(step, min(length, most // step * step)) for length in (short, long))


def _tokens(model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """Random tokens `[rows, length]`, none of those that have a meaning of their own."""
    config = model.config.get_text_config()
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None) or config.vocab_size
    named = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    special = {value for value in tree_leaves(named) if isinstance(value, int)}
    usable = torch.tensor([token for token in range(vocabulary) if token not in special])
    drawn = torch.randint(len(usable), (rows, length), generator=torch.Generator().manual_seed(rows))
    return usable[drawn]
