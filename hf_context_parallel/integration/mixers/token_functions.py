"""Functions by which mixers of Transformers mix tokens, and the shapes of their arguments.

A mixer looks them up by name in its module. The name may stand for a function of Transformers or for a kernel of
another package. Everything else in such a mixer is computed token by token.
"""

from __future__ import annotations

import dis
import inspect
from functools import cache
from types import CodeType
from typing import NamedTuple

import torch


class Scan(NamedTuple):
    """A function that carries a state along the sequence, for each head by itself.

    Args:
        positional: names of the arguments that may be passed by position, in order.
        by_head: names of tensors `[B, S, H, ...]`. The first output has this shape too.
        by_group: names of tensors `[B, S, G, ...]`. H / G consecutive heads read one of the G groups.
        per_head: names of parameters `[H, ...]`.
        options: names of arguments that are the same for all heads.
    """

    positional: tuple[str, ...]
    by_head: tuple[str, ...]
    by_group: tuple[str, ...]
    per_head: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


DELTA_RULE = Scan(
    positional=("query", "key", "value", "g", "beta"),
    by_head=("value", "g", "beta"),
    by_group=("query", "key"),
    options=("chunk_size", "use_qk_l2norm_in_kernel"),
)
STATE_SPACE = Scan(
    positional=("hidden_states", "dt", "A", "B", "C"),
    by_head=("hidden_states", "dt"),
    by_group=("B", "C"),
    per_head=("A", "D", "dt_bias"),
    options=("chunk_size", "dt_softplus", "dt_limit"),
)
SCANS = {
    "torch_chunk_gated_delta_rule": DELTA_RULE,
    "chunk_kimi_delta_attention": DELTA_RULE,
    "mamba2_chunk_scan": STATE_SPACE,
}
"""Known scans by name."""

CONVOLUTION = "causal_conv1d_fn"
"""Name of the causal convolution of `[B, C, S]` by weights `[C, K]`."""
CONVOLUTION_ARGUMENTS = ("hidden_states", "weight", "bias", "activation")

FUSED = "mamba2_split_conv1d_scan_combined"
"""Name of a kernel that computes a whole mixer. If it returns None, the mixer calls the other functions."""


BY_TOKEN = "apply_mask_to_padding_states"
DECODING = frozenset(
    {
        "causal_conv1d_update",
        "mamba2_selective_state_update",
        "recurrent_kimi_delta_attention",
        "torch_recurrent_gated_delta_rule",
    }
)
"""Functions that a mixer calls when it has a cache. On a shard it has none."""


@cache
def _globals_of(code: CodeType) -> frozenset[str]:
    """Return the global names that code looks up. The result is cached, as mixers ask for it in every call.

    `co_names` would hold attributes too, and older versions of Transformers call `self.causal_conv1d_fn`.
    """
    return frozenset(step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")


def token_functions(module: torch.nn.Module) -> set[str]:
    """Return the known functions that the forward of a module calls by name.

    The set is empty if the forward calls any other function, since that might mix tokens.
    """
    forward = inspect.unwrap(type(module).forward)
    if not inspect.isfunction(forward):  # a compiled forward, for instance
        return set()
    functions = {name for name in _globals_of(forward.__code__) if callable(forward.__globals__.get(name))}
    known = functions & {*SCANS, CONVOLUTION, FUSED}
    return known if functions <= known | DECODING | {BY_TOKEN} else set()
