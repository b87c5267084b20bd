"""The attention function and the mask function that Transformers calls for "
"`attn_implementation="context_parallel"`."""

from __future__ import annotations

import sys
import weakref
from functools import cache

import torch
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.p2p import ring_attention
from ..kernels import check_kernel
from .context import ShardedBatch, current_batch
from .models import NAME, check_config

HARMLESS = {
    "cache_position",
    "is_causal",
    "labels",
    "num_items_in_batch",
    "output_hidden_states",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "shift_labels",
    "use_cache",
}
"""Keywords that attention functions are passed and that do not change what they compute (`is_causal` is checked)."""

_sharded = weakref.WeakSet()
"""The modules whose last forward pass was of a shard: their recomputation must be too."""


def register() -> None:
    """Tell Transformers of `attn_implementation="context_parallel"`, by its public interfaces."""
    AttentionInterface.register(NAME, context_parallel_attention)
    AttentionMaskInterface.register(NAME, context_parallel_mask)


def context_parallel_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer: of the current batch's shard, or outside of one as Transformers would compute it.

    Args:
        query: `[B, H, S, D]`.
        key, value: `[B, H_kv, S, D]`.

    Returns:
        `[B, S, H, D]`, and None for the weights.

    Raises:
        ValueError: for anything that would not be exact.
    """
    batch = current_batch()
    if batch is None:
        return _unsharded_attention(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    _refuse(module, attention_mask, dropout, kwargs)
    _check_lengths(batch, query, key)
    _sharded.add(module)
    batch.attended = True
    query, key, value = one_dtype(query, key, value)
    kernel = batch.cp.kernel(query.device)
    check_kernel(kernel, query, value)
    output = ring_attention(
        tokens_first(query),
        tokens_first(key),
        tokens_first(value),
        plan=batch.shard.plan,
        exchange=batch.cp.exchange,
        kernel=kernel,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        guard=batch.check_backward,
    )
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


def context_parallel_mask(**kwargs) -> torch.Tensor | None:
    """The mask of one layer type: none for a shard, whose plan has it; else what Transformers would make.

    Raises:
        ValueError: if the model's type or its mask is not known to be exact on a shard.
    """
    config = kwargs["config"]
    batch = current_batch()
    if batch is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[unsharded_implementation(type(config))](**kwargs)
    check_config(config)
    if kwargs.get("attention_mask") is not None:
        raise ValueError("a shard's model was given an attention_mask: call it with what cp.shard yields and no more.")
    if kwargs.get("use_vmap"):
        raise ValueError(
            f"{config.model_type!r} adds a mask of its own to the causal one, and it is not known how that is "
            "sharded. Call the model outside cp.shard."
        )
    return None


def one_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in one dtype, as attention wants them: autocast's where it is on, else the widest of theirs.

    Under autocast, models whose norm or RoPE computes in float32 hand over queries and keys wider than the values.
    """
    device_type = tensors[0].device.type
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device_type)
    return [tensor.to(dtype) for tensor in tensors]


def tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]` as `[B * S, H, D]`."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _refuse(module: torch.nn.Module, attention_mask: torch.Tensor | None, dropout: float, kwargs: dict) -> None:
    """Refuse what a layer asks for and a shard cannot give exactly."""
    layer = type(module).__name__
    if attention_mask is not None:
        raise ValueError(
            f"{layer} was given an attention mask of shape {tuple(attention_mask.shape)}: masks made by the caller "
            "cannot be sharded. Give the batch to cp.shard with a 2-D attention_mask or with packed position_ids."
        )
    if dropout > 0:
        raise ValueError(
            f"{layer} asks for attention dropout of {dropout}, which is not supported. Set it to 0 in the model's "
            "config (attention_dropout, attn_pdrop or the like)."
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{layer} is not causal, and cp.shard makes causal plans. Call the model outside cp.shard.")
    for name, value in kwargs.items():
        if name not in HARMLESS and value is not None and value is not False:
            raise ValueError(
                f"{layer} asks for {name}={value if isinstance(value, (int, float, str)) else type(value).__name__}, "
                "which context-parallel attention does not know and will not ignore."
            )


def _check_lengths(batch: ShardedBatch, query: torch.Tensor, key: torch.Tensor) -> None:
    shard = batch.shard
    expected = (shard.batch_size, shard.layout.local_length(shard.plan.rank))
    for name, tensor in (("queries", query), ("keys", key)):
        found = (tensor.shape[0], tensor.shape[2])
        if found != expected:
            raise ValueError(
                f"a layer has {found[0]} rows of {found[1]} {name} where the shard has {expected[0]} of "
                f"{expected[1]}. Prompt and prefix tuning, generate() and caches add tokens that no shard holds, and "
                "are not supported in cp.shard. A vision tower, or another part that does not see the text, needs its "
                f'own attention: attn_implementation={{"text_config": "{NAME}", "vision_config": "sdpa"}}.'
            )


def _unsharded_attention(module, query, key, value, attention_mask, scaling, dropout, kwargs):
    """What the implementation that Transformers would choose for this class computes."""
    if torch._C._current_graph_task_id() != -1:  # inside a backward pass, so a recomputation
        if module in _sharded:
            raise RuntimeError(
                "gradient checkpointing recomputes a layer of a sharded batch after leaving it: call backward() "
                "inside `with cp.shard(...)`."
            )
    else:
        _sharded.discard(module)
    if unsharded_implementation(type(module.config)) == "sdpa":
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    else:
        function = sys.modules[type(module).__module__].eager_attention_forward
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


@cache
def unsharded_implementation(config_class: type[PreTrainedConfig]) -> str:
    """`"sdpa"` or `"eager"`: what Transformers chooses for a model of this configuration when nothing is asked for.

    Raises:
        ValueError: if Transformers knows no model of it.
    """
    model_class = MODEL_MAPPING.get(config_class, None)
    if model_class is None:
        raise ValueError(
            f"which attention {config_class.__name__} has outside cp.shard is not known, since Transformers maps "
            "no model to it. Load the model with attn_implementation='sdpa' or 'eager' where it is not sharded."
        )
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    return "sdpa" if model_class._supports_sdpa else "eager"
