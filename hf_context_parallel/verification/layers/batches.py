"""Batches of the self-check: a row of packed documents, and rows with padding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ...compat import layer_configs, tree_leaves
from ...context_parallel import ContextParallel
from ...integration.model_registry import transformers_model
from ...integration.tensor_parallel.sequence_parallel import Shares
from ...planning import mask as masks
from ...planning.balanced import padded_layout

TOKENS_A_RANK = 16
"""Fewest tokens of a row, for each rank."""
LONGEST = 1024
"""Most tokens of a row that is made longer than the window of the model's attention."""
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "local_attention", "attention_window_size")
"""Fields of configurations that limit the distance of a query and the keys that it reads."""


@dataclass
class Batch:
    """Whole batch, and the columns of it that this rank holds.

    Args:
        kind: the name of the batch, `"packed"` or `"padded"`.
        inputs: the inputs of one process, `[B, S]` each.
        pieces: the columns that the model gets at a time on whole sequences: one document, or all columns.
        real: `[B, S]`, False at padding.
        columns: `[S_local]`, the columns of this rank's shard; with sequence parallelism, its share of them.
    """

    kind: str
    inputs: dict[str, torch.Tensor]
    pieces: list[slice]
    real: torch.Tensor
    columns: torch.Tensor
    _drawn: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def draw(self, like: torch.Tensor, piece: slice, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Draw random numbers for each token of a piece. Every call draws the same numbers, which are 0 at padding.

        Args:
            like: `[B, S, ...]`, a tensor with the dtype, the device and the last dimensions of the result.
            piece: the columns of the piece.
            columns: columns within the piece to select; all if None.
        """
        shape = (*self.real.shape, *like.shape[2:])
        if shape not in self._drawn:
            numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            self._drawn[shape] = numbers * self.real.view(*self.real.shape, *[1] * (like.dim() - 2))
        numbers = self._drawn[shape][:, piece]
        return (numbers if columns is None else numbers[:, columns]).to(like)

    def mine(self, piece: slice) -> torch.Tensor:
        """Select the columns of a piece that this rank holds, counted from the first column of the piece."""
        inside = (self.columns >= piece.start) & (self.columns < piece.stop)
        return self.columns[inside] - piece.start


def make_batches(model: torch.nn.Module, cp: ContextParallel) -> list[Batch]:
    """Make the batches: a row of three documents, and two shorter rows padded on the left and on the right."""
    inner = transformers_model(model)
    device = next(inner.parameters()).device
    device = cp.groups.device if device.type == "meta" else device  # offloaded weights move there when used
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
        layout = padded_layout(cp.config.layout, real.shape[1], cp.size, dealt, cp.config.max_tokens_per_rank)
        columns = layout.positions(cp.rank)
        if cp.config.sequence_parallel:  # layers and mixers see this rank's share of the shard
            columns = columns[Shares(cp.groups.tensor, len(columns)).mine]
        inputs = {name: value.to(device) for name, value in inputs.items()}
        batches.append(Batch(kind, inputs, pieces, real.bool(), columns))
    return batches


def _lengths(model: PreTrainedModel, cp: ContextParallel) -> tuple[int, int]:
    """Compute two lengths of rows: one that gives every rank tokens, and twice the longest window up to `LONGEST`."""
    config = model.config.get_text_config()
    windows = [getattr(layer, name, None) for layer in layer_configs(config) for name in WINDOWS]
    doubled = [2 * window for window in windows if isinstance(window, int) and 0 < 2 * window <= LONGEST]
    # Multiples of this need no padding, neither by a layout nor by sequence parallelism.
    step = 2 * cp.size * (cp.groups.tensor.size if cp.config.sequence_parallel else 1)
    most = getattr(config, "max_position_embeddings", None) or LONGEST
    short = -(-TOKENS_A_RANK * cp.size // step) * step
    long = max([short, *(-(-window // step) * step for window in doubled)])
    return tuple(max(step, min(length, most // step * step)) for length in (short, long))


def _tokens(model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """Draw random tokens `[rows, length]` without special tokens."""
    config = model.config.get_text_config()
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None) or config.vocab_size
    named = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    special = {value for value in tree_leaves(named) if isinstance(value, int)}
    usable = torch.tensor([token for token in range(vocabulary) if token not in special])
    drawn = torch.randint(len(usable), (rows, length), generator=torch.Generator().manual_seed(rows))
    return usable[drawn]
