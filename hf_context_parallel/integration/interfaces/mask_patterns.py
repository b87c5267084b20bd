"""The patterns that Transformers' mask functions describe."""

from __future__ import annotations

import dis
import inspect

from ...planning.mask import Pattern


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
