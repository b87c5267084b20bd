"""Reading of Transformers' mask functions: the pattern that each describes."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable

from ...planning.mask import Pattern


def read_pattern(function: Callable, model_type: str, text_only: bool = True) -> Pattern:
    """Return the pattern that a mask function of Transformers describes. Documents and padding are ignored.

    Args:
        function: a function of batch, head, query and key indices, which may join others.
        model_type: name of the model type, for messages.
        text_only: whether all tokens of the whole batch are text. A rank sees its shard alone, so it is told.

    Raises:
        ValueError: naming the function that is not known.
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
        return Pattern(causal=False, sliding_window=inside["sliding_window"])  # it is joined with a causal function
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        return Pattern(causal=False, sliding_window=inside["sliding_window"] + 1)  # it counts distance, not tokens
    if name == "_bidirectional_window_overlay.<locals>.inner_mask":
        return Pattern(causal=False, sliding_window=inside["sliding_window"])
    if name == "chunked_overlay.<locals>.inner_mask":
        return Pattern(causal=False, chunk_size=inside["chunk_size"])
    if name in ("bidirectional_mask_function", "packed_sequence_mask_function.<locals>.inner_mask"):
        return Pattern(causal=False)  # the plan has the documents of packed rows, which a shard does not show
    if _reads_nothing(function) and bool(function()):
        return Pattern(causal=False)
    raise ValueError(
        f"{model_type!r} masks attention by {name!r}, and only causal, bidirectional, sliding-window and chunked "
        "masks can be sharded. Run the model in `with cp.whole(model):`."
    )


def _both(patterns: list[Pattern], model_type: str) -> Pattern:
    """Return the pattern of the keys that all of the patterns admit."""
    windows = [x.sliding_window for x in patterns if x.sliding_window is not None]
    sizes = [x.chunk_size for x in patterns if x.chunk_size is not None]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{model_type!r} masks attention by chunks of several sizes at once, {sizes}, and only chunks of one size "
            "can be sharded. Run the model in `with cp.whole(model):`."
        )
    return Pattern(any(x.causal for x in patterns), min(windows, default=None), min(sizes, default=None))


def _either(patterns: list[Pattern], model_type: str) -> Pattern:
    """Return the one pattern that admits every key that any of them admits.

    Raises:
        ValueError: if none of the patterns contains all others.
    """
    for widest in patterns:
        if all(_contains(widest, other) for other in patterns):
            return widest
    raise ValueError(
        f"{model_type!r} masks attention by the union of {patterns}, none of which contains all others, and such a "
        "mask cannot be sharded. Run the model in `with cp.whole(model):`."
    )


def _contains(wide: Pattern, narrow: Pattern) -> bool:
    """Return whether the pattern `wide` admits every key that `narrow` admits."""
    window = wide.sliding_window
    return (
        (not wide.causal or narrow.causal)
        and (window is None or (narrow.sliding_window is not None and narrow.sliding_window <= window))
        and (wide.chunk_size is None or wide.chunk_size == narrow.chunk_size)
    )


def _is_text_only(function) -> bool:
    """Return whether a mask function joins blocks of tokens, such as those of images, and the shard has no block."""
    if function.__qualname__ != "blockwise_overlay.<locals>.inner_mask":
        return False
    return bool((inspect.getclosurevars(function).nonlocals["block_sequence_ids"] < 0).all())


def _reads_nothing(function) -> bool:
    """Return whether a function takes any arguments and uses none of them."""
    code = function.__code__
    return code.co_argcount == 0 and not any(
        step.opname.startswith("LOAD_FAST") or step.opname == "LOAD_DEREF" for step in dis.get_instructions(code)
    )
