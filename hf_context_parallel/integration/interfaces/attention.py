"""Attention function that Transformers calls for `attn_implementation="context_parallel"`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from ...compat import add_to_attention_tables
from ...planning.mask import Pattern
from ..active_batch import active_batch
from ..model_registry import NAME, attends_to_layers, sees_whole
from ..patches.module_patch import ran_sharded
from ..patches.positions import corrected_query, counts_tokens
from .compiled_attention import attention_in_graph
from .planned_mask import PlannedMask
from .sharded_attention import sharded_attention
from .stock_attention import unsharded_attention

HARMLESS = {
    "cache_position",
    "is_causal",
    "labels",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "shift_labels",
    "sliding_window",
    "use_cache",
}
"""Keyword arguments that do not change the result of an attention function, once the mask is given."""


def register() -> None:
    """Register the attention function with Transformers."""
    AttentionInterface.register(NAME, context_parallel_attention)
    add_to_attention_tables(NAME, sees_whole, _refuse_in_batch)


def _refuse_in_batch(module: torch.nn.Module, table: str) -> None:
    """Let a module that was chosen from a table of its model type raise on a shard. A tower may run it."""

    def check(module: torch.nn.Module, args: Any) -> None:
        if active_batch() is not None:
            raise ValueError(
                f"{type(module).__name__} was chosen from {table}, for which {NAME!r} has not been found exact on "
                "shards. Run the model in `with cp.whole(model):`."
            )

    module.register_forward_pre_hook(check)


def context_parallel_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PlannedMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the attention of one layer for the shard of the active batch.

    Without an active batch it is the attention that Transformers would compute.

    Args:
        query: `[B, H, S, D]`.
        key, value: `[B, H_kv, S, D]` and `[B, H_kv, S, D_v]`.
        attention_mask: the mask that our mask function has made, or None.
        scaling: factor of the scores; None for `D ** -0.5`.
        dropout: probability with which a weight is dropped.
        softcap: bound of the scores, or None.
        s_aux: sinks, `[H]`, or None.

    Returns:
        `[B, S, H, D_v]`, and None in the place of the weights.

    Raises:
        ValueError: for arguments with which attention on shards would not be exact.
    """
    # Only the layers of a shard have a planned mask. An operator that is recomputed would draw other dropout.
    planned = isinstance(attention_mask, PlannedMask)
    if torch.compiler.is_compiling() and planned and not dropout and not counts_tokens(module):
        rule = _rule(module, attention_mask, kwargs)
        return attention_in_graph(module, query, key, value, attention_mask, rule, scaling, softcap, s_aux), None
    return _attention(module, (query, key, value), attention_mask, scaling, dropout, softcap, s_aux, kwargs)


@torch.compiler.disable
def _attention(
    module: torch.nn.Module,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention_mask: PlannedMask | torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention where nothing is traced. The arguments are those of `context_parallel_attention`."""
    query, key, value = tensors
    batch = active_batch()
    if batch is None or attends_to_layers(module):
        asked = {"softcap": softcap, "s_aux": sinks}
        kwargs |= {name: value for name, value in asked.items() if value is not None}
        return unsharded_attention(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    pattern = _rule(module, attention_mask, kwargs)
    if isinstance(attention_mask, PlannedMask):
        pattern = attention_mask.pattern
    ran_sharded.add(module)
    query = corrected_query(module, query, batch)
    layer = type(module).__name__, getattr(module, "layer_idx", None)
    return sharded_attention(batch, *layer, query, key, value, sinks, pattern, scaling, softcap, dropout), None


def _rule(module: torch.nn.Module, attention_mask: PlannedMask | torch.Tensor | None, kwargs: dict) -> Pattern:
    """Return the pattern of keys that a layer reads, without blocks.

    The mask decides, as in SDPA, which ignores keywords such as `sliding_window`.

    Raises:
        ValueError: if the mask and the keywords contradict each other, or either is unknown.
    """
    layer = type(module).__name__
    for name, value in kwargs.items():
        off = value is None or (isinstance(value, (bool, int)) and not value)
        if name not in HARMLESS and not off:
            raise ValueError(
                f"{layer} asks for {name}={value if isinstance(value, (int, float, str)) else type(value).__name__}, "
                "which context-parallel attention does not know. Run the model in `with cp.whole(model):`."
            )
    if isinstance(attention_mask, PlannedMask):
        pattern = attention_mask.rule
        window = kwargs.get("sliding_window")
        if window is not None and pattern.sliding_window not in (window, window + 1):  # some count the token itself
            raise ValueError(
                f"{layer} asks for sliding_window={window} and its mask has {pattern.sliding_window}: SDPA would use "
                "the mask, and flash attention the keyword. Run the model in `with cp.whole(model):`."
            )
        if kwargs.get("is_causal") is False and pattern.causal:
            raise ValueError(f"{layer} is not causal and its mask is. Run the model in `with cp.whole(model):`.")
        return pattern
    if attention_mask is not None:
        raise ValueError(
            f"{layer} was given an attention mask of shape {tuple(attention_mask.shape)}, and a mask tensor cannot be "
            "sharded. Describe padding by a 2-D attention_mask, and documents by position_ids that begin again."
        )
    if kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"{layer} asks for sliding_window={kwargs['sliding_window']} without a mask: SDPA would ignore the "
            "window, and flash attention would use it. Run the model in `with cp.whole(model):`."
        )
    causal = kwargs.get("is_causal")
    return Pattern(causal=getattr(module, "is_causal", True) if causal is None else causal)
