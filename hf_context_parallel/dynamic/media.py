"""Images, videos and sounds of samples: cut out of batches, joined in rows, and weighed by the work of towers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..distributed.agreement import fingerprint
from ..distributed.host import on_host
from ..integration.checks.media import explained, placeholders
from ..integration.model_registry import decoder_of, known_multimodal, models_inside
from ..integration.towers.division import GRIDS, SIZES, Division, divide, lists_by_row
from ..integration.towers.shared import TOWERS
from ..memory.tower_facts import TowerSizes

TYPES = ("token_type_ids", "mm_token_type_ids")
"""Inputs `[B, S]` that say of which kind a token is."""
IMAGE_AXES = 3
"""Number of axes of positions that models with images have: frames, rows and columns."""
PADDED_BY = (SIZES, "pixel_attention_mask", "pixel_mask")
"""Inputs that say which part of an image is padding, so that images of several sizes are padded with zeros."""
PACKED = "packed"
"""Kind of batch in the table of types. A type that has it was found exact with images in packed rows."""
EQUAL = {"pixel_attention_mask", "pixel_mask", "high_res_pixel_values"}
"""Inputs of towers that give all images equally many tokens, or as many as their grids say."""

Media = dict[str, torch.Tensor]
Span = tuple[int, int, int]
"""Row, first token, and the token after the last one, of a document."""
_BATCH_OF_ONE = "Make batches of one sample (per_device_train_batch_size=1, with gradient accumulation)"


class Kind(NamedTuple):
    """Images, videos or sounds, as a model takes them.

    Args:
        name: `"image"`, `"video"` or `"audio"`.
        arguments: inputs of the model for them. The first holds what is encoded.
        config: the configuration of the tower, or None.
        placeholders: ids of the tokens whose places the features take.
        products: products of two numbers in a unit of `TowerSizes.cost`, in all passes of a step.
    """

    name: str
    arguments: tuple[str, ...]
    config: PreTrainedConfig | None
    placeholders: frozenset[int]
    products: int

    @property
    def items(self) -> str:
        """Word for several of them, in errors."""
        return "sounds" if self.name == "audio" else f"{self.name}s"

    def divided(self, media: Mapping[str, Any]) -> Division | None:
        """Divide what a batch has of this kind into items, or return None if it has none.

        Raises:
            ValueError: if it cannot be divided.
        """
        given = {name: media[name] for name in self.arguments if media.get(name) is not None}
        if not given:
            return None
        division = divide(given, self.arguments[0], self.config)
        if division is None:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
            raise ValueError(
                f"dynamic=True deals samples to groups with their {self.items}, and these inputs cannot be divided by "
                f"{self.items}: {shapes}. Set dynamic=False."
            )
        return division


class MediaOfModel:
    """Media that a model takes.

    Args:
        module: a Transformers model.
    """

    def __init__(self, module: PreTrainedModel):
        self._module = module
        taken = inspect.signature(module.forward).parameters
        self.kinds = [kind for name in TOWERS if (kind := _kind(module, name, taken)) is not None]
        self.types = tuple(name for name in TYPES if name in taken) if self.kinds else ()
        """Those of `TYPES` that the model takes."""
        self.names = tuple(dict.fromkeys(name for kind in self.kinds for name in kind.arguments))
        """Inputs that hold media."""
        self._index: Callable | None = next(
            (part.get_rope_index for part in module.modules() if hasattr(part, "get_rope_index")), None
        )
        self.axes = IMAGE_AXES if self.kinds and self._index is not None else 0
        """Number of axes of positions beside those in the text."""

    def cut(self, batch: Mapping[str, Any], ids: torch.Tensor, spans: Sequence[Span]) -> list[Media]:
        """Cut the media of a batch into those of its documents.

        Args:
            batch: the batch, of which inputs of media are read.
            ids: `[B, S]`.
            spans: the documents.

        Raises:
            ValueError: if it is not clear which are those of which document, or documents of a row cannot have media.
        """
        media = {name: _host(name, batch[name]) for name in self.names if batch.get(name) is not None}
        found: list[Media] = [{} for _ in spans]
        for kind in self.kinds:
            division = kind.divided(media)
            if division is None:
                continue
            self._check(batch)
            counts = [sum(int((ids[row, a:b] == token).sum()) for token in kind.placeholders) for row, a, b in spans]
            for number, items in enumerate(_items(division, counts, kind)):
                if items:
                    found[number] |= {
                        name: _host(name, x) for name, x in division.taken(items).items() if x is not None
                    }
        return found

    def positions(self, ids: torch.Tensor, types: Mapping[str, torch.Tensor], media: Media) -> torch.Tensor:
        """Return the positions of a document on the axes of images, `[IMAGE_AXES, length]`.

        Args:
            ids: `[length]`.
            types: those of its `TYPES` that the batch has, `[length]` each.
            media: its media. Without any, positions count tokens on all axes.
        """
        plain = torch.arange(len(ids)).expand(IMAGE_AXES, -1)
        if self._index is None or not media:
            return plain
        given = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **media}
        given |= {name: x[None] for name, x in types.items()}
        taken = inspect.signature(self._index).parameters
        try:
            found = self._index(**{name: x for name, x in given.items() if name in taken})[0]
        except Exception as error:  # of any kind, if placeholders do not fit
            raise explained(error, self._module, given) from error
        return found[:, 0].long() if found.dim() == 3 and len(found) == IMAGE_AXES else plain

    def work(self, media: Media) -> tuple[int, int]:
        """Count the products of two numbers that towers take for a sample: `(all items, the largest item)`."""
        costs = [
            kind.products * cost
            for kind in self.kinds
            if (division := kind.divided(media)) is not None
            for cost in division.costs
        ]
        return sum(costs), max(costs, default=0)

    def joined(self, samples: Sequence[Media]) -> Media:
        """Join the media of the samples of a row."""
        result = {}
        for kind in self.kinds:
            for name in kind.arguments:
                parts = [media[name] for media in samples if name in media]
                if parts:
                    by_row = any(_is_listed_by_row(media, kind) for media in samples)
                    result[name] = _concatenated(parts, dim=1 if by_row else 0)
        return result

    def forms(self, media: Media) -> list[int]:
        """Return a fingerprint for each of `kinds`, 0 without such media. Samples of a row must have the same ones."""
        found = []
        for kind in self.kinds:
            given = {name: media[name] for name in kind.arguments if name in media}
            padded = any(name in given for name in PADDED_BY)
            form: dict[str, Any] = {}
            for name, x in given.items():
                others = None if padded else tuple(x.shape[2 if _is_listed_by_row(given, kind) else 1 :])
                form[name] = str(x.dtype), x.dim(), others
            found.append(fingerprint(form) if form else 0)
        return found

    def _check(self, batch: Mapping[str, Any]) -> None:
        """Refuse types that are not exact in packed rows, and batches without types of tokens that the model takes."""
        name = self._module.config.model_type
        known = known_multimodal().get(name)
        if known is not None and PACKED not in known["errors"]:
            raise ValueError(
                f"dynamic=True packs samples as the documents of a row, and {name} has not been found exact with "
                "images in packed rows (docs/multimodal.md). Set dynamic=False."
            )
        missing = [name for name in self.types if batch.get(name) is None]
        if missing:
            raise ValueError(
                f"the batch has media and no {missing[0]}, which {type(self._module).__name__} takes. Make batches by "
                "the processor of the model, which returns it beside input_ids."
            )


def _kind(module: PreTrainedModel, name: str, taken: Mapping[str, Any]) -> Kind | None:
    """Describe the media that a function of a model encodes, or return None if the model has no such function."""
    owner = next((x for x in module.modules() if isinstance(x, PreTrainedModel) and hasattr(x, name)), None)
    if owner is None:
        return None
    function = getattr(owner, name)
    arguments = tuple(x for x in inspect.signature(function).parameters if x in taken and x not in _SETTINGS)
    if not arguments:
        return None
    kind, config = name.split("_")[1], getattr(owner.config, TOWERS[name], None)
    text = {id(x) for x in text_parameters(module)}
    trained = any(x.requires_grad for x in owner.parameters() if id(x) not in text)
    passes = 3 if trained else 1  # backward takes twice as much as forward
    ids = frozenset(placeholders(owner.config, kind))
    return Kind(kind, arguments, config, ids, passes * 2 * TowerSizes.of(config).width)


def text_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """List the parameters of the decoder and of the output embeddings, and none of towers."""
    parts = [decoder_of(model), model.get_output_embeddings()]
    found = {id(x): x for part in parts if part is not None for x in part.parameters()}
    return list(found.values())


def trains_towers(model: torch.nn.Module | None) -> bool:
    """Return whether parameters are trained that a batch without media does not use."""
    module = None if model is None else next(models_inside(model), None)
    if module is None:
        return False
    text = {id(x) for x in text_parameters(module)}
    return bool(MediaOfModel(module).kinds) and any(x.requires_grad for x in module.parameters() if id(x) not in text)


_SETTINGS = ("kwargs", "return_dict", "output_hidden_states", "output_attentions", "use_cache")


def _items(division: Division, counts: Sequence[int], kind: Kind) -> list[list[int]]:
    """Find the items of each document, in order.

    Args:
        counts: number of placeholders of each document.

    Raises:
        ValueError: if this is not clear.
    """
    every = list(range(len(division.costs)))
    holders = [number for number, count in enumerate(counts) if count]
    if len(counts) == 1 or len(holders) == 1:
        only = holders[0] if holders else 0
        return [every if number == only else [] for number in range(len(counts))]
    # All items have equally many placeholders, or all their patches.
    weights = division.patches or [1] * len(every)
    tokens, patches = sum(counts), sum(weights)
    is_known = tokens and not set(division.by_item) - {*EQUAL, *GRIDS}
    if division.patches is None:
        is_known = is_known and tokens % patches == 0
    else:
        is_known = is_known and patches % tokens == 0 and all(one % (patches // tokens) == 0 for one in weights)
    ends = {end * tokens: number for number, end in enumerate(accumulate(weights), start=1)}
    edges = [0, *(ends.get(end * patches, 0) for end in accumulate(counts))]
    if not is_known or any(count and not end for count, end in zip(counts, edges[1:])):
        raise ValueError(
            f"dynamic=True deals samples to groups with their {kind.items}, and it is not clear which of the "
            f"{len(every)} {kind.items} belong to which of {len(counts)} samples with {list(counts)} placeholders. "
            f"{_BATCH_OF_ONE}, or set dynamic=False."
        )
    return [every[begin:end] if count else [] for count, begin, end in zip(counts, accumulate(edges, max), edges[1:])]


def _is_listed_by_row(media: Media, kind: Kind) -> bool:
    """Return whether a sample lists its images along the second dimension."""
    name = kind.arguments[0]
    return name in media and lists_by_row(name, media[name], media)


def _concatenated(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate tensors, which are padded with zeros to the largest in their other dimensions."""
    shape = [max(sizes) for sizes in zip(*(x.shape for x in parts))]
    padded = []
    for x in parts:
        target = x.new_zeros(*shape[:dim], x.shape[dim], *shape[dim + 1 :])
        target[tuple(slice(size) for size in x.shape)] = x
        padded.append(target)
    return torch.cat(padded, dim)


def _host(name: str, x: Any) -> torch.Tensor:
    """Return an input on the host. Sizes of images may be a list.

    Raises:
        ValueError: for another list.
    """
    if not isinstance(x, torch.Tensor) and name != SIZES:
        raise ValueError(
            f"{name} is a {type(x).__name__}, and with dynamic=True it must be a tensor, which is divided by items. "
            "Let the processor return tensors (return_tensors='pt'), or set dynamic=False."
        )
    return on_host(torch.as_tensor(x))
