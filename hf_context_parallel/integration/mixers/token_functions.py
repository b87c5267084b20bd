"""The functions by which Transformers' mixers mix tokens, and how they take their tensors.

A mixer looks them up by name in its module, whether the name stands for Transformers' own or for a kernel of another
package. All else that it does, it does token by token.
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
        positional: the names of the arguments that come by position.
        by_head: those of `[B, S, H, ...]`; the first returned has this shape as well.
        by_group: those of `[B, S, G, ...]`, each of which H / G heads in a row read.
        per_head: parameters of `[H, ...]`.
        options: what is the same for all heads.
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
"""The scans by name."""

CONVOLUTION = "causal_conv1d_fn"
"""The causal convolution of `[B, C, S]` by weights of `[C, K]`."""
CONVOLUTION_ARGUMENTS = ("hidden_states", "weight", "bias", "activation")

FUSED = "mamba2_split_conv1d_scan_combined"
"""All of a mixer in one kernel. Where there is none it returns None, and the mixer goes on with the others."""


BY_TOKEN = "apply_mask_to_padding_states"
DECODING = frozenset(
    {
        "causal_conv1d_update",
        "mamba2_selective_state_update",
        "recurrent_kimi_delta_attention",
        "torch_recurrent_gated_delta_rule",
    }
)
"""What takes the place of the others when there is a cache, which there is not on a shard."""


@cache
def _globals_of(code: CodeType) -> frozenset[str]:
    """The names that code looks up in its module, read once: mixers ask in every call.

    Not `co_names`, which has attributes as well: older versions of Transformers call `self.causal_conv1d_fn`.
    """
    return frozenset(step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")


def token_functions(module: torch.nn.Module) -> set[str]:
    """Which of these functions a module's forward calls by name; none if it calls others, which might mix tokens."""
    forward = inspect.unwrap(type(module).forward)
    if not inspect.isfunction(forward):  # compiled, say
        return set()
    functions = {name for name in _globals_of(forward.__code__) if callable(forward.__globals__.get(name))}
    known = functions & {*SCANS, CONVOLUTION, FUSED}
    return known if functions <= known | DECODING | {BY_TOKEN} else set()
