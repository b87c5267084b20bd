"""Mask function that Transformers calls for `attn_implementation="context_parallel"`.

Transformers describes the mask of a layer type by a function of indices, joined from simpler functions. On a shard the
pattern is read from these functions, and no mask tensor is made. A function that is not known is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionMaskInterface

from ...compat import chunks_count_from_documents, find_no_documents_if
from ...data.shard import Shard
from ...planning.mask import Pattern
from ..active_batch import active_batch
from ..model_registry import DEPENDS_ON_ATTN_NAME, NAME
from ..outer_call import outer_call
from ..switches import switches
from .compiled_attention import of_batch
from .mask_patterns import read_pattern
from .planned_mask import PlannedMask
from .stock_attention import unsharded_implementation

GIVEN_A_MASK = (
    "the model of a sharded batch was given an attention_mask, which cp.shard has already used. Call the model with "
    "what cp.shard yields and no more, and call generate() outside the block."
)


def register() -> None:
    """Register the mask function with Transformers.

    Transformers also looks for packed documents in the positions of a shard, for which the host waits for the device.
    The plan has the documents, so nothing is looked for there.
    """
    AttentionMaskInterface.register(NAME, context_parallel_mask)
    find_no_documents_if(lambda: active_batch() is not None)


@torch.compiler.disable
def context_parallel_mask(**kwargs: Any) -> Any:
    """Make the mask of one layer type: a `PlannedMask` for a shard, else the mask that Transformers would make.

    Raises:
        ValueError: if the mask cannot be sharded, or if the model type needs another attention outside of a batch.
    """
    config = kwargs["config"]
    batch, call = active_batch(), outer_call()
    options = {name: value for name, value in kwargs.items() if name.startswith("allow_is_")}
    if batch is None and call is not None and not call.is_alone and call.is_of_decoder(config):
        pattern = read_pattern(kwargs["mask_function"], config.model_type, whole=True)
        return PlannedMask(pattern, config, options, padding=kwargs.get("attention_mask"))
    if batch is None:
        if config.model_type in DEPENDS_ON_ATTN_NAME and not switches.stock_attn_name:
            raise ValueError(
                f"{config.model_type!r} asks what its attention is called, and outside of cp.shard it would compute "
                f"something else under the name {NAME!r}. To generate or evaluate without cp.shard, call "
                "model.set_attn_implementation('eager') before, or load the model without our attention if its class "
                "does not allow that."
            )
        return AttentionMaskInterface()[unsharded_implementation(type(config))](**kwargs)
    given = kwargs.get("attention_mask")
    if isinstance(given, PlannedMask):  # the model around the decoder has made it
        return given
    if given is not None and not given.all():  # some models make a mask of ones when they are given none
        raise ValueError(GIVEN_A_MASK)
    pattern = read_pattern(kwargs["mask_function"], config.model_type, text_only=not batch.shard.typed)
    check_chunks(pattern, config.model_type, batch.shard)
    return of_batch(PlannedMask(pattern, config, options), batch)


def check_chunks(pattern: Pattern, model_type: str, shard: Shard) -> None:
    """Refuse chunked attention of documents that Transformers would cut into other chunks.

    Raises:
        ValueError: with what to change.
    """
    if pattern.chunk_size is not None and not chunks_count_from_documents() and shard.packed:
        raise ValueError(
            f"{model_type!r} has chunked attention, and the installed version of Transformers counts chunks "
            "from the start of the row and not of each document. Install Transformers 5.18 or newer, or do not pack."
        )
    if pattern.chunk_size is not None and shard.begins % pattern.chunk_size:
        raise ValueError(
            f"{model_type!r} has attention in chunks of {pattern.chunk_size} positions, and a packed document "
            "begins at a position that is no multiple of it, so Transformers would cut other chunks than this "
            "package. Let the position_ids of each document begin at 0."
        )
