"""Reading of Transformers' mask functions: the pattern that each describes."""

from __future__ import annotations

import dis
import inspect
import math
from collections.abc import Callable
from functools import partial

import torch

from ...distributed.host import on_host
from ...planning.intervals import Interval
from ...planning.mask import Block, Pattern

BLOCKS = "blockwise_overlay.<locals>.inner_mask"
"""Name of the mask function that lets tokens of one block read each other."""
PREFILL = "create_reference_sliding_window_causal_mask.<locals>.prefill_overlay"
"""Name of the mask function of Unlimited-OCR that lets tokens read the prefill whatever the window says."""
WINDOW = "sliding_window_overlay.<locals>.inner_mask"
"""Name of the mask function that limits how far back a token reads, and not how far ahead."""


def read_pattern(function: Callable, model_type: str, text_only: bool = True, whole: bool = False) -> Pattern:
    """Return the pattern that a mask function of Transformers describes. Documents and padding are ignored.

    Args:
        function: a function of batch, head, query and key indices, which may join others.
        model_type: name of the model type, for messages.
        text_only: whether all tokens of the whole batch are text. A rank sees its shard alone, so it is told.
        whole: whether the function is that of the whole batch, so that its blocks are those of the batch.

    Raises:
        ValueError: naming the function that is not known.
    """
    name = function.__qualname__
    inside = inspect.getclosurevars(function).nonlocals
    read = partial(read_pattern, model_type=model_type, text_only=text_only, whole=whole)
    if name == "and_masks.<locals>.and_mask":
        return _both([(part.__qualname__, read(part)) for part in inside["mask_functions"]], model_type)
    if name == "or_masks.<locals>.or_mask":
        parts = inside["mask_functions"]
        blocks = [part for part in parts if part.__qualname__ == BLOCKS and (whole or (text_only and _is_text(part)))]
        pattern = _either([read(part) for part in parts if part not in blocks], model_type)
        for part in blocks if whole else ():
            pattern = _with_blocks(pattern, blocks_of_ids(_ids_of(part)), model_type)
        return pattern
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return read(inside["mask_function"])
    if name == "causal_mask_function":
        return Pattern(causal=True)
    if name == WINDOW:
        return Pattern(causal=False, sliding_window=inside["sliding_window"])  # it is joined with a causal function
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        return Pattern(causal=False, sliding_window=inside["sliding_window"] + 1)  # it counts distance, not tokens
    if name == "_bidirectional_window_overlay.<locals>.inner_mask":
        return Pattern(causal=False, sliding_window=inside["sliding_window"])
    if name == "chunked_overlay.<locals>.inner_mask":
        return Pattern(causal=False, chunk_size=inside["chunk_size"])
    if name == PREFILL and inside["prefill_length"] == math.inf:  # without a cache all is prefill
        return Pattern(causal=False)
    if name in ("bidirectional_mask_function", "packed_sequence_mask_function.<locals>.inner_mask"):
        return Pattern(causal=False)  # the plan has the documents of packed rows, which a shard does not show
    if _reads_nothing(function) and bool(function()):
        return Pattern(causal=False)
    raise ValueError(
        f"{model_type!r} masks attention by {name!r}, and only causal, bidirectional, sliding-window and chunked "
        "masks can be sharded. Run the model in `with cp.whole(model):`."
    )


def blocks_of_ids(ids: torch.Tensor) -> tuple[tuple[Block, ...], ...]:
    """List the blocks of each row, from the number of each token's block, `[B, S]`. Negative numbers are no block.

    Returns:
        Nothing if no row has a block of several tokens.
    """
    found = []
    for row in on_host(ids):
        edges = [0, *(row.diff().nonzero().flatten() + 1).tolist(), len(row)]
        blocks: dict[int, list[Interval]] = {}
        for start, stop, number in zip(edges, edges[1:], row[edges[:-1]].tolist()):
            if number >= 0:
                blocks.setdefault(number, []).append((start, stop))
        several = [block for block in blocks.values() if sum(stop - start for start, stop in block) > 1]
        found.append(tuple(tuple(block) for block in several))
    return tuple(found) if any(found) else ()


def _with_blocks(pattern: Pattern, blocks: tuple[tuple[Block, ...], ...], model_type: str) -> Pattern:
    """Return the pattern that admits the keys of a pattern, and those of the block of a token too."""
    if not blocks or pattern == Pattern(causal=False):
        return pattern
    if not pattern.causal or pattern.chunk_size is not None or pattern.blocks:
        raise ValueError(
            f"{model_type!r} masks attention by {pattern.rule} joined with blocks of tokens, and blocks can be "
            "sharded beside causal masks and windows alone. Run the model in `with cp.whole(model):`."
        )
    return pattern._replace(blocks=blocks)


def _both(named: list[tuple[str, Pattern]], model_type: str) -> Pattern:
    """Return the pattern of the keys that all of the patterns admit, each with the name of its function."""
    patterns = [pattern for _, pattern in named]
    for index, pattern in enumerate(patterns):
        if pattern.blocks:
            return _blocks_within(pattern, named[:index] + named[index + 1 :], model_type)
    windows = [x.sliding_window for x in patterns if x.sliding_window is not None]
    sizes = [x.chunk_size for x in patterns if x.chunk_size is not None]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{model_type!r} masks attention by chunks of several sizes at once, {sizes}, and only chunks of one size "
            "can be sharded. Run the model in `with cp.whole(model):`."
        )
    return Pattern(any(x.causal for x in patterns), min(windows, default=None), min(sizes, default=None))


def _blocks_within(pattern: Pattern, others: list[tuple[str, Pattern]], model_type: str) -> Pattern:
    """Return a pattern with blocks, limited by others: by documents, or by a window that looks back."""
    window = pattern.sliding_window
    for name, other in others:
        if other == Pattern(causal=False):
            continue
        if name != WINDOW or window is not None:
            raise ValueError(
                f"{model_type!r} limits blocks of tokens by {name!r}, and only one window can be sharded beside "
                "blocks. Run the model in `with cp.whole(model):`."
            )
        window = other.sliding_window
        pattern = pattern._replace(sliding_window=window, blocks_in_window=True)
    return pattern


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


def _ids_of(function: Callable) -> torch.Tensor:
    """Return the numbers of blocks that a mask function joins, `[B, S]`."""
    ids: torch.Tensor = inspect.getclosurevars(function).nonlocals["block_sequence_ids"]
    return ids


def _is_text(function: Callable) -> bool:
    """Return whether a mask function that joins blocks finds no block."""
    return bool((_ids_of(function) < 0).all())


def _reads_nothing(function) -> bool:
    """Return whether a function takes any arguments and uses none of them."""
    code = function.__code__
    return code.co_argcount == 0 and not any(
        step.opname.startswith("LOAD_FAST") or step.opname == "LOAD_DEREF" for step in dis.get_instructions(code)
    )
