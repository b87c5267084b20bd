"""Stock attention: the attention and the masks of Transformers, for code outside of a batch and whole sequences."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ...compat import attention_name, default_attention, mask_piece, set_attention_name, tree_map
from ...distributed.host import beside
from ..model_registry import NAME
from ..patches.module_patch import refuse_recomputation
from ..switches import switches
from .planned_mask import PlannedMask


def unsharded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PlannedMask | torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention with the implementation that Transformers would choose for the class of the model.

    Raises:
        RuntimeError: if a layer that ran on a shard is recomputed without its batch.
    """
    refuse_recomputation(module)
    for listener in switches.listeners:
        listener(module)
    eager = _eager(module)
    stock = unsharded_implementation(type(module.config))
    function = AttentionInterface()["sdpa"] if stock == "sdpa" else eager
    if switches.other_attention and eager is not None:
        if stock == "sdpa":
            function, attention_mask = eager, _additive(module, query, key, attention_mask, kwargs)
        else:
            function = _widened(eager)
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def _eager(module: torch.nn.Module) -> Callable | None:
    """Return the eager attention function in the file of the class of a module, or of a base of it.

    FSDP2 derives a class for each module, so bases are searched too. None if there is no such function.
    """
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next((file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")), None)


def _additive(module, query, key, attention_mask, kwargs) -> torch.Tensor:
    """Turn a mask for SDPA into the tensor that eager attention adds to the scores.

    Without a mask, SDPA is causal if the layer is.
    """
    if attention_mask is None:
        attention_mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if causal and query.shape[2] > 1:
            attention_mask = attention_mask.tril()
    if attention_mask.dtype != torch.bool:
        return attention_mask
    return torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, _least(query.dtype))


def _widened(function: Callable) -> Callable:
    """Make an attention function compute in a wider dtype: float64 for float32 and float64, else float32."""

    def wide(module, query, *args: Any, **kwargs: Any):
        dtype = torch.float64 if query.dtype in (torch.float32, torch.float64) else torch.float32

        def widen(x):
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        with torch.autocast(query.device.type, enabled=False):
            output, weights = function(module, widen(query), *tree_map(widen, args), **tree_map(widen, kwargs))
        return output.to(query.dtype), weights

    return wide


def whole_mask(
    mask: PlannedMask, rows: int, length: int, padding: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    """Make the mask tensor that stock attention gets for whole sequences, in the place of a `PlannedMask`.

    Args:
        mask: the mask that the module was given on the shard.
        rows, length: shape of the whole sequences.
        padding: `[rows, length]`, 0 at padding, or None.
        like: a tensor with the dtype and device of the computation.
    """
    padding = None if padding is None else beside(padding, like).bool()
    # Without padding Transformers may skip the mask, and some models then compute another attention. In a batch with
    # padding it makes the mask for all rows, so here it must not be skipped either. A causal mask is never skipped:
    # Transformers takes a shard whose positions are not consecutive for packed documents, so ranks would differ.
    options = {
        name: value and padding is None and name != "allow_is_causal_skip" for name, value in mask.options.items()
    }
    causal, window, chunk = mask.rule[:3]
    if mask.pattern.blocks:
        raise ValueError(
            f"{mask.config.model_type!r} has a module that sees whole sequences and reads blocks of tokens, such as "
            "those of images, which are known by their places in rows. Run the model in `with cp.whole(model):`."
        )
    parts = [mask_piece("causal_mask_function" if causal else "bidirectional_mask_function")]
    if window is not None:
        overlay = mask_piece("sliding_window_overlay" if causal else "sliding_window_bidirectional_overlay")
        parts.append(overlay(window if causal else window - 1))
    if chunk is not None:
        left = torch.zeros(rows, dtype=torch.long) if padding is None else (padding.cumsum(-1) == 0).sum(-1)
        parts.append(mask_piece("chunked_overlay")(chunk, left if padding is not None else beside(left, like)))
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
        made = made.clamp(min=_least(made.dtype))
    return made if made is None or mask.dtype is None else made.to(mask.dtype)


def _least(dtype: torch.dtype) -> float:
    """Return the number that masks a score.

    Eager attention computes softmax in float32. There the least float64 becomes -inf, and a row of padding NaN.
    """
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


@contextmanager
def stock_attention(module: torch.nn.Module) -> Iterator[None]:
    """Give the configurations inside a module the name of their stock attention, in this block.

    Some layers ask for the name. Layers that pick their keys write the choice into the mask only if the name is one of
    Transformers.
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


def _model_of(fits: Callable[[type[PreTrainedConfig]], bool]) -> type[PreTrainedModel] | None:
    """Return a model class whose configuration class fits, or None. It may be a part of a composite model."""
    kinds = list(PreTrainedModel.__subclasses__())
    for kind in kinds:
        found = getattr(kind, "config_class", None)
        if found is not None and fits(found):
            return kind
        kinds += kind.__subclasses__()
    return None


@cache
def unsharded_implementation(config_class: type[PreTrainedConfig]) -> str:
    """Return `"sdpa"` or `"eager"`: the default attention of Transformers for a model of this configuration.

    Raises:
        ValueError: if Transformers has no model of this configuration.
    """
    model_class = MODEL_MAPPING.get(config_class, None) or _model_of(lambda kind: kind is config_class)
    if model_class is None:  # a part of a model that is no model itself
        model_class = _model_of(lambda kind: config_class in kind.sub_configs.values())
    if model_class is None:
        raise ValueError(
            f"Transformers maps no model to {config_class.__name__}, so its attention outside cp.shard is not known. "
            "Load the model with attn_implementation='sdpa' or 'eager' where it is not sharded."
        )
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    return default_attention(model_class)
