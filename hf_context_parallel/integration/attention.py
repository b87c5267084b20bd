"""The attention function that Transformers calls for `attn_implementation="context_parallel"`."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, PreTrainedConfig

from ..attention import attend, one_dtype
from ..attention.strategy import Shape
from ..compat import add_to_attention_tables
from ..kernels import check_kernel
from ..kernels.base import make_scores, seed_of
from ..mask import Pattern
from .context import ShardedBatch
from .current import current_batch
from .masks import PlannedMask, unsharded_implementation
from .models import NAME, TEXT_ALONE, attends_to_layers, sees_whole
from .positions import corrected_query

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
"""Keywords that attention functions are passed and that do not change what they compute, given the mask."""

_sharded = weakref.WeakSet()
"""The modules whose last forward pass was of a shard: their recomputation must be too."""
_listeners: list[Callable[[torch.nn.Module], None]] = []
_otherwise = False


def register() -> None:
    """Tell Transformers of the attention function."""
    AttentionInterface.register(NAME, context_parallel_attention)
    add_to_attention_tables(NAME, sees_whole, _no_entry)


def _no_entry(config: PreTrainedConfig, table: str) -> ValueError:
    return ValueError(
        f"model type {config.model_type!r} is refused: it chooses its attention by its own {table}, where "
        f"{NAME!r} is not known to be exact. Load it with attn_implementation='eager', or, where it is one part of a "
        f"composite model, give each part its own, as attn_implementation={TEXT_ALONE}."
    )


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
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one layer: of the current batch's shard, or outside of one as Transformers would compute it.

    Args:
        query: `[B, H, S, D]`.
        key, value: `[B, H_kv, S, D]` and `[B, H_kv, S, D_v]`.
        s_aux: sinks, `[H]`.

    Returns:
        `[B, S, H, D_v]`, and None for the weights.

    Raises:
        ValueError: for anything that would not be exact.
    """
    batch = current_batch()
    if batch is None or attends_to_layers(module):
        asked = {"softcap": softcap, "s_aux": s_aux}
        kwargs |= {name: value for name, value in asked.items() if value is not None}
        return _unsharded_attention(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    pattern = _pattern(module, attention_mask, kwargs)
    _check_lengths(batch, query, key)
    _sharded.add(module)
    batch.note(module, "ring")
    query = corrected_query(module, query, batch)
    query, key, value = one_dtype(query, key, value)
    kernel = batch.cp.kernel(query.device)
    scores = make_scores(query, scaling, softcap, dropout, torch.are_deterministic_algorithms_enabled())
    check_kernel(kernel, query, value, scores)
    # Ranks of a tensor-parallel group may draw alike, and their heads are not the same ones.
    scores = scores._replace(seed=seed_of(scores.seed, batch.cp.groups.tensor.rank))
    output = attend(
        query,
        key,
        value,
        strategy=batch.strategy(module, pattern, Shape.of(query, key, value), query.device),
        exchange=batch.cp.exchange,
        kernel=kernel,
        scores=scores,
        sinks=s_aux,
        guard=batch.check_backward,
    )
    return output, None


def _pattern(module: torch.nn.Module, attention_mask: PlannedMask | torch.Tensor | None, kwargs: dict) -> Pattern:
    """Which keys a layer reads. The mask says it, as with SDPA, which goes by no other keyword.

    Raises:
        ValueError: if a layer asks for something that a shard cannot give exactly.
    """
    layer = type(module).__name__
    for name, value in kwargs.items():
        off = value is None or (isinstance(value, (bool, int)) and not value)
        if name not in HARMLESS and not off:
            raise ValueError(
                f"{layer} asks for {name}={value if isinstance(value, (int, float, str)) else type(value).__name__}, "
                "which context-parallel attention does not know and will not ignore. Call the model outside cp.shard."
            )
    if isinstance(attention_mask, PlannedMask):
        pattern = attention_mask.pattern
        window = kwargs.get("sliding_window")
        if window is not None and pattern.sliding_window not in (window, window + 1):  # some count the token itself
            raise ValueError(
                f"{layer} asks for sliding_window={window} and its mask has {pattern.sliding_window}: SDPA goes by "
                "the mask and flash attention by the keyword. Call the model outside cp.shard."
            )
        if kwargs.get("is_causal") is False and pattern.causal:
            raise ValueError(f"{layer} is not causal and its mask is. Call the model outside cp.shard.")
        return pattern
    if attention_mask is not None:
        raise ValueError(
            f"{layer} was given an attention mask of shape {tuple(attention_mask.shape)}: masks made by the caller "
            "cannot be sharded. Give the batch to cp.shard with a 2-D attention_mask or with packed position_ids."
        )
    if kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"{layer} asks for sliding_window={kwargs['sliding_window']} without a mask that has it, so that SDPA "
            "would ignore it and flash attention not. Call the model outside cp.shard."
        )
    causal = kwargs.get("is_causal")
    return Pattern(causal=getattr(module, "is_causal", True) if causal is None else causal)


def _check_lengths(batch: ShardedBatch, query: torch.Tensor, key: torch.Tensor) -> None:
    expected = batch.shard.local_shape
    for name, tensor in (("queries", query), ("keys", key)):
        found = (tensor.shape[0], tensor.shape[2])
        if found != expected:
            raise ValueError(
                f"a layer has {found[0]} rows of {found[1]} {name} where the shard has {expected[0]} of "
                f"{expected[1]}. Prompt and prefix tuning, generate() and caches add tokens that no shard holds, and "
                "are not supported in cp.shard. A vision tower, or another part that does not see the text, needs its "
                f"own attention: attn_implementation={TEXT_ALONE}."
            )


@contextmanager
def heard_by(listener: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """Call `listener(module)` for each layer whose attention is computed outside of a batch meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def computed_otherwise() -> Iterator[None]:
    """Outside of a batch, attention is meanwhile computed in the other way that Transformers has: where that would be
    SDPA, the class's eager function; where that is all there is, the same in a wider dtype."""
    global _otherwise
    before, _otherwise = _otherwise, True
    try:
        yield
    finally:
        _otherwise = before


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
    for listener in _listeners:
        listener(module)
    eager = _eager(module)
    stock = unsharded_implementation(type(module.config))
    function = AttentionInterface()["sdpa"] if stock == "sdpa" else eager
    if _otherwise and eager is not None:
        if stock == "sdpa":
            function, attention_mask = eager, _additive(module, query, key, attention_mask, kwargs)
        else:
            function = _widened(eager)
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def _eager(module: torch.nn.Module) -> Callable | None:
    """The eager attention function beside a module's class, or beside one that it is derived from, as FSDP2's are."""
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next((file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")), None)


def _additive(module, query, key, attention_mask, kwargs) -> torch.Tensor:
    """What eager attention adds to the scores, where SDPA gets this mask, or none and is causal by itself."""
    if attention_mask is None:
        attention_mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if causal and query.shape[2] > 1:
            attention_mask = attention_mask.tril()
    if attention_mask.dtype != torch.bool:
        return attention_mask
    least = torch.finfo(query.dtype).min
    return torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, least)


def _widened(function: Callable) -> Callable:
    """An attention function that computes in float32, or float64 where it is given that or float32."""

    def wide(module, query, *args, **kwargs):
        dtype = torch.float64 if query.dtype in (torch.float32, torch.float64) else torch.float32

        def widen(x):
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        with torch.autocast(query.device.type, enabled=False):
            output, weights = function(module, widen(query), *tree_map(widen, args), **tree_map(widen, kwargs))
        return output.to(query.dtype), weights

    return wide
