"""The mask function that Transformers calls for `attn_implementation="context_parallel"`.

Transformers describes a layer type's mask by a function of indices, put together from pieces. On a shard these are
read for what they are, and the plan computes with that: no matrix is made. A piece that is not known is refused.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionMaskInterface

from ...compat import chunks_count_from_documents
from ..active_batch import active_batch
from ..model_registry import DEPENDS_ON_ATTN_NAME, NAME
from ..switches import switches
from .mask_patterns import read_pattern
from .planned_mask import PlannedMask
from .stock_attention import unsharded_implementation

GIVEN_A_MASK = (
    "a shard's model was given an attention_mask: call it with what cp.shard yields and no more, and generate() "
    "outside the block."
)


def register() -> None:
    """Tell Transformers of the mask function."""
    AttentionMaskInterface.register(NAME, context_parallel_mask)


def context_parallel_mask(**kwargs) -> Any:
    """The mask of one layer type: a `PlannedMask` for a shard; else what Transformers would make.

    Raises:
        ValueError: if the model's type or its mask is not known to be exact on a shard.
    """
    config = kwargs["config"]
    batch = active_batch()
    if batch is None:
        if config.model_type in DEPENDS_ON_ATTN_NAME and not switches.stock_attn_name:
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
