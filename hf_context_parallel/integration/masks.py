"""The mask function that Transformers calls for `attn_implementation="context_parallel"`.

Transformers describes a layer type's mask by a function of indices, put together from pieces. On a shard these are
read for what they are, and the plan computes with that: no matrix is made. A piece that is not known is refused.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import MODEL_MAPPING, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ..compat import attention_name, chunks_count_from_documents, default_attention, mask_piece, set_attention_name
from ..mask import Pattern
from .current import current_batch
from .models import ASK_FOR_THE_NAME, NAME

GIVEN_A_MASK = (
    "a shard's model was given an attention_mask: call it with what cp.shard yields and no more, and generate() "
    "outside the block."
)

_told_otherwise = False


class _NotATensor(ValueError, AttributeError):
    """Both, so that `hasattr` says no and everything else stops with the message."""


class PlannedMask:
    """What a layer gets as its attention mask on a shard, and hands to our attention: the pattern that it wants."""

    def __init__(
        self, pattern: Pattern, config: PreTrainedConfig, options: dict[str, Any], dtype: torch.dtype | None = None
    ):
        self.pattern = pattern
        self.dtype = dtype
        self.config = config
        self.options = options

    def to(self, *args, **kwargs) -> PlannedMask:
        """Itself, to be in another dtype when it is a tensor."""
        dtype = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), self.dtype)
        return PlannedMask(self.pattern, self.config, self.options, dtype)

    def _refuse(self, use: str):
        raise _NotATensor(
            f"{self.config.model_type!r} computes with its attention mask itself ({use}), which on a shard is a plan "
            "and no matrix. Call the model outside cp.shard."
        )

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f".{name}")

    def __getitem__(self, index):
        self._refuse("indexing")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        mask = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, PlannedMask))
        mask._refuse(getattr(function, "__name__", str(function)))

    def _arithmetic(self, *_):
        self._refuse("arithmetic")

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __invert__ = __and__ = __or__ = _arithmetic


def register() -> None:
    """Tell Transformers of the mask function."""
    AttentionMaskInterface.register(NAME, context_parallel_mask)


def context_parallel_mask(**kwargs) -> Any:
    """The mask of one layer type: a `PlannedMask` for a shard; else what Transformers would make.

    Raises:
        ValueError: if the model's type or its mask is not known to be exact on a shard.
    """
    config = kwargs["config"]
    batch = current_batch()
    if batch is None:
        if config.model_type in ASK_FOR_THE_NAME and not _told_otherwise:
            raise ValueError(
                f"{config.model_type!r} asks what its attention is called, and by our name computes something else "
                "outside of cp.shard than by Transformers' own. To generate or evaluate without cp.shard call "
                "model.set_attn_implementation('eager') before, where its class allows that, or load it without ours."
            )
        return AttentionMaskInterface()[unsharded_implementation(type(config))](**kwargs)
    given = kwargs.get("attention_mask")
    if given is not None and not given.all():  # some models make one of ones when they are given none
        raise ValueError(GIVEN_A_MASK)
    pattern = read_pattern(kwargs["mask_function"], config.model_type, text_only=not batch.shard.typed)
    if pattern.chunk_size is not None and not chunks_count_from_documents() and batch.shard.packed:
        raise ValueError(
            f"{config.model_type!r} has chunked attention, whose chunks this version of Transformers counts from the "
            "row's start and newer ones from each document's. Upgrade Transformers, or do not pack."
        )
    if pattern.chunk_size is not None and batch.shard.begins % pattern.chunk_size:
        raise ValueError(
            f"{config.model_type!r} has attention in chunks of {pattern.chunk_size} positions, and a packed document "
            "begins at a position that is no multiple of that: here chunks are counted from its first token, and in "
            "Transformers by position_ids. Let the position_ids of each document begin at 0."
        )
    options = {name: value for name, value in kwargs.items() if name.startswith("allow_is_")}
    return PlannedMask(pattern, config, options)


def whole_mask(
    mask: PlannedMask, rows: int, length: int, padding: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    """What the model's own attention would have been given for whole sequences in the place of a shard's mask.

    Args:
        padding: `[rows, length]`, 0 at padding, or None for none.
        like: a tensor of the dtype and device that the model computes in.
    """
    padding = None if padding is None else padding.to(like.device).bool()
    # A row without padding would have no mask, and some models' attention is another one then: not so in its batch.
    options = mask.options if padding is None else dict.fromkeys(mask.options, False)
    causal, window, chunk = mask.pattern
    parts = [mask_piece("causal_mask_function" if causal else "bidirectional_mask_function")]
    if window is not None:
        overlay = mask_piece("sliding_window_overlay" if causal else "sliding_window_bidirectional_overlay")
        parts.append(overlay(window if causal else window - 1))
    if chunk is not None:
        left = torch.zeros(rows, dtype=torch.long) if padding is None else (padding.cumsum(-1) == 0).sum(-1)
        parts.append(mask_piece("chunked_overlay")(chunk, left.to(like.device)))
    local_size = [size for size in (window, chunk) if size is not None]
    made = AttentionMaskInterface()[unsharded_implementation(type(mask.config))](
        batch_size=rows,
        q_length=length,
        kv_length=length,
        q_offset=0,
        kv_offset=0,
        mask_function=parts[0] if len(parts) == 1 else mask_piece("and_masks")(*parts),
        attention_mask=padding,
        local_size=min(local_size) if local_size else None,
        dtype=like.dtype,
        config=mask.config,
        use_vmap=False,
        device=like.device,
        **options,
    )
    if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
        # Softmax is computed in float32, where the least of float64 is -inf and a row of padding NaN.
        made = made.clamp(min=torch.finfo(torch.float32).min)
    return made if made is None or mask.dtype is None else made.to(mask.dtype)


@contextmanager
def told_otherwise() -> Iterator[None]:
    """Models that ask for the name of their attention run outside of a batch: the layers that ask are told stock's."""
    global _told_otherwise
    before, _told_otherwise = _told_otherwise, True
    try:
        yield
    finally:
        _told_otherwise = before


@contextmanager
def stock_attention(module: torch.nn.Module) -> Iterator[None]:
    """The configurations of a module's parts name the attention that they would have without us.

    Some layers ask for the name: those that pick their keys put that into the mask for Transformers' own alone.
    """
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    ours = [config for config in configs.values() if attention_name(config) == NAME]
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    of_models = {id(model.config): default_attention(type(model)) for model in models}
    for config in ours:
        name = of_models.get(id(config)) or unsharded_implementation(type(config))
        set_attention_name(config, name)
    try:
        yield
    finally:
        for config in ours:
            set_attention_name(config, NAME)


def read_pattern(function, model_type: str, text_only: bool = True) -> Pattern:
    """The pattern that one of Transformers' mask functions describes, documents and padding aside.

    Args:
        text_only: whether all tokens of the whole batch, of which a rank sees its shard, are text's.

    Raises:
        ValueError: naming the piece that is not known.
    """
    name = function.__qualname__
    inside = inspect.getclosurevars(function).nonlocals
    if name == "and_masks.<locals>.and_mask":
        return _both([read_pattern(part, model_type, text_only) for part in inside["mask_functions"]], model_type)
    if name == "or_masks.<locals>.or_mask":
        parts = [part for part in inside["mask_functions"] if not (text_only and _is_text_only(part))]
        return _either([read_pattern(part, model_type, text_only) for part in parts], model_type)
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return read_pattern(inside["mask_function"], model_type, text_only)
    if name == "causal_mask_function":
        return Pattern(causal=True)
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return Pattern(causal=False, sliding_window=inside["sliding_window"])  # causal is what it is laid over
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        return Pattern(causal=False, sliding_window=inside["sliding_window"] + 1)  # it counts distance, not tokens
    if name == "_bidirectional_window_overlay.<locals>.inner_mask":
        return Pattern(causal=False, sliding_window=inside["sliding_window"])
    if name == "chunked_overlay.<locals>.inner_mask":
        return Pattern(causal=False, chunk_size=inside["chunk_size"])
    if name in ("bidirectional_mask_function", "packed_sequence_mask_function.<locals>.inner_mask"):
        return Pattern(causal=False)  # a shard cannot tell a packed row's documents; they are in the plan
    if _reads_nothing(function) and bool(function()):
        return Pattern(causal=False)
    raise ValueError(
        f"{model_type!r} masks attention by {name!r}, and it is not known how that is sharded. Known are causal, "
        "bidirectional, sliding-window and chunked masks. Call the model outside cp.shard."
    )


def _both(patterns: list[Pattern], model_type: str) -> Pattern:
    """What all of them let a token read."""
    windows = [x.sliding_window for x in patterns if x.sliding_window is not None]
    sizes = [x.chunk_size for x in patterns if x.chunk_size is not None]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{model_type!r} lets a token read what chunks of {sizes} tokens both say, and it is not known how that "
            "is sharded. Call the model outside cp.shard."
        )
    return Pattern(any(x.causal for x in patterns), min(windows, default=None), min(sizes, default=None))


def _either(patterns: list[Pattern], model_type: str) -> Pattern:
    """What any of them lets a token read, if that is one of them."""
    for widest in patterns:
        if all(_contains(widest, other) for other in patterns):
            return widest
    raise ValueError(
        f"{model_type!r} lets a token read what either of {patterns} says, and it is not known how that is sharded. "
        "Call the model outside cp.shard."
    )


def _contains(wide: Pattern, narrow: Pattern) -> bool:
    """Whether a token reads in one pattern all that it reads in the other."""
    window = wide.sliding_window
    return (
        (not wide.causal or narrow.causal)
        and (window is None or (narrow.sliding_window is not None and narrow.sliding_window <= window))
        and (wide.chunk_size is None or wide.chunk_size == narrow.chunk_size)
    )


def _is_text_only(function) -> bool:
    """Whether a mask function is that of blocks of tokens, such as an image's, and there is none in this shard."""
    if function.__qualname__ != "blockwise_overlay.<locals>.inner_mask":
        return False
    return bool((inspect.getclosurevars(function).nonlocals["block_sequence_ids"] < 0).all())


def _reads_nothing(function) -> bool:
    """Whether a function of any arguments looks at none of them."""
    code = function.__code__
    return code.co_argcount == 0 and not any(
        step.opname.startswith("LOAD_FAST") or step.opname == "LOAD_DEREF" for step in dis.get_instructions(code)
    )


def _model_of(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """A model that is made of this configuration, which may be a part of a composite one that Transformers maps."""
    kinds = list(PreTrainedModel.__subclasses__())
    for kind in kinds:
        if getattr(kind, "config_class", None) is config_class:
            return kind
        kinds += kind.__subclasses__()
    return None


@cache
def unsharded_implementation(config_class: type[PreTrainedConfig]) -> str:
    """`"sdpa"` or `"eager"`: what Transformers chooses for a model of this configuration when nothing is asked for.

    Raises:
        ValueError: if Transformers knows no model of it.
    """
    model_class = MODEL_MAPPING.get(config_class, None) or _model_of(config_class)
    if model_class is None:
        raise ValueError(
            f"which attention {config_class.__name__} has outside cp.shard is not known, since Transformers maps "
            "no model to it. Load the model with attn_implementation='sdpa' or 'eager' where it is not sharded."
        )
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    return default_attention(model_class)
