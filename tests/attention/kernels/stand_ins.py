"""Stand-ins for functions of FlashAttention, with the signatures that each version has.

They check their arguments as the library does and compute with the reference kernel. `signatures.json` holds the
parameters of the functions, the file that they were read from, and the number of values that the forward returns.
"""

import inspect
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import torch

from hf_context_parallel.attention.kernels.reference import ReferenceKernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.tiles import Band, Segments

SIGNATURES = json.loads(Path(__file__).with_name("signatures.json").read_text())
NAMES = {
    "flash_attn": ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    "flash_attn_3": ("_flash_attn_forward", "_flash_attn_backward"),
    "flash_attn_4": ("_flash_attn_fwd", "_flash_attn_bwd"),
}
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
MASKS = ("causal", "is_causal", "window_size", "window_size_left", "window_size_right")
READ = {"q", "k", "v", *LENGTHS, *MASKS, "dropout_p", "softmax_scale", "softcap", "return_softmax", "return_lse"}
READ_BACKWARD = {*READ, "dout", "out", "softmax_lse", "lse", "dq", "dk", "dv", "deterministic"}

told = []
"""Value of `deterministic` in each call of a backward, and "cudnn" for each call of cuDNN's."""


def band_2(causal, left, right, max_queries, max_keys):
    """Band of FlashAttention-2 (`mha_varlen_fwd` and `set_params_fprop`; the same in 2.6 to 2.8 and in PyTorch)."""
    left, right = (-1 if limit is None else limit for limit in (left, right))
    right = 0 if causal else right
    left, right = (-1 if limit >= max_keys else limit for limit in (left, right))
    if left >= 0 and right < 0:
        right = max_keys
    elif left < 0 and right > 0:  # right == 0 is causal
        left = max_keys
    return tuple(None if limit == -1 else limit for limit in (left, right))


def band_3(causal, left, right, max_queries, max_keys):
    """Band of FlashAttention-3 (`mha_fwd` and `set_params_fprop` of hopper/flash_api.cpp)."""
    left = -1 if left >= max_keys - 1 else left
    right = 0 if causal else -1 if right >= max_queries - 1 else right
    if (left, right) == (-1, -1):
        return None, None
    return left if left >= 0 else None if right == 0 else max_keys - 1, right if right >= 0 else max_queries - 1


def band_4(causal, left, right, max_queries, max_keys):
    """Band of FlashAttention-4 (`_resolve_causal_local_window` of flash_attn/cute/interface.py)."""
    assert all(limit is None or limit >= 0 for limit in (left, right))
    return left, 0 if causal else right


BANDS = {"flash_attn": band_2, "flash_attn_3": band_3, "flash_attn_4": band_4}


def takes_dims(library, heads, key_heads, dim, value_dim):
    """Return whether a library takes these head dims, in forward and backward on Hopper."""
    if max(dim, value_dim) > 256 or dim % 8 or value_dim % 8:
        return False
    if dim == value_dim:
        return True
    if library == "flash_attn_4":
        return heads == key_heads
    return library == "flash_attn_3" and 128 < dim <= 192 and 96 < value_dim <= 128


def packed(library, given):
    """Check the arguments of a varlen call by their names. Return query, key and value, segments and scores."""
    query, key, value, *lengths = (given[name] for name in ("q", "k", "v", *LENGTHS))
    assert given.get("dropout_p", 0) == 0
    assert query.dtype == key.dtype == value.dtype in (torch.bfloat16, torch.float16)
    assert takes_dims(library, query.shape[1], key.shape[1], query.shape[2], value.shape[2])
    assert key.shape[:2] == value.shape[:2] and query.shape[2] == key.shape[2] and query.shape[1] % key.shape[1] == 0
    for tensor in (query, key, value):
        assert tensor.dim() == 3 and tensor.stride(-1) == 1
        assert not any(n * tensor.itemsize % 16 for n in (tensor.storage_offset(), *tensor.stride()[:-1]))
    ranges = []
    for rows, cumulative, longest in zip((query, key), lengths[:2], lengths[2:]):
        assert cumulative.dtype == torch.int32 and cumulative.is_contiguous() and cumulative.device == rows.device
        edges = cumulative.tolist()
        ranges.append(tuple(zip(edges, edges[1:])))
        assert edges[0] == 0 and edges[-1] == len(rows)
        assert min(stop - start for start, stop in ranges[-1]) > 0
        assert max(stop - start for start, stop in ranges[-1]) <= longest
    assert len(ranges[0]) == len(ranges[1])
    causal = given["is_causal" if "is_causal" in given else "causal"]
    window = (
        given["window_size"] if "window_size" in given else (given["window_size_left"], given["window_size_right"])
    )
    assert isinstance(causal, bool) and isinstance(given["softmax_scale"], float)
    band = Band(*BANDS[library](causal, *window, *lengths[2:]))
    return (query, key, value), Segments(*ranges, band), Scores(given["softmax_scale"], given.get("softcap") or None)


def packed_forward(library, given):
    """Compute the output and the LSE `[H, Q]`."""
    tensors, segments, scores = packed(library, given)
    output, lse = ReferenceKernel().forward(*tensors, segments, scores)
    return output, lse.T.contiguous()


def packed_backward(library, given):
    """Compute the gradients of query, key and value."""
    told.append(given["deterministic"])
    (query, key, value), segments, scores = packed(library, given)
    grad, output, lse = given["dout"], given["out"], given["softmax_lse" if "softmax_lse" in given else "lse"]
    for tensor in (grad, output):
        assert tensor.shape == (*query.shape[:2], value.shape[2])
        assert tensor.dtype == query.dtype and tensor.stride(-1) == 1
    assert lse.shape == (query.shape[1], len(query)) and lse.dtype == torch.float32 and lse.is_contiguous()
    found = ReferenceKernel().backward(grad, query, key, value, output, lse.T, segments, scores)
    return [share.to(query.dtype) for share in found]


@cache
def interface(version):
    """Make the module of a version: its two functions, each with its signature.

    Functions that are operators of PyTorch are so here too. An operator has a typed schema and no Python signature.
    """
    library, recorded = version.split()[0], SIGNATURES[version]

    def forward(given):
        output, lse = packed_forward(library, given)
        if library == "flash_attn_4":
            assert given["return_lse"]
        count = recorded["forward_returns"]
        if library == "flash_attn" and count == 8:
            return output, given["q"], given["k"], given["v"], output, lse, None, torch.empty(2)
        return output, lse, *(torch.empty(0) if recorded["operators"] else None for _ in range(count - 2))

    def backward(given):
        found = packed_backward(library, given)
        if library == "flash_attn_4":
            return tuple(found)
        for name, grad in zip(("dq", "dk", "dv"), found):
            assert given[name].shape == grad.shape
            given[name].copy_(grad)
        return torch.empty(0) if recorded["operators"] else (*(given[name] for name in ("dq", "dk", "dv")), None)

    names = NAMES[library]
    functions = [
        _function(version, name, recorded, side, compute)
        for name, side, compute in zip(names, ("forward", "backward"), (forward, backward))
    ]
    return SimpleNamespace(**dict(zip(names, functions)))


def _function(version, name, recorded, side, compute):
    scope = {"Tensor": torch.Tensor, "Optional": Optional}
    exec(f"def function({recorded[side]}) -> {_returned(recorded, side)}: ...", scope)
    signature = inspect.signature(scope["function"])
    read = READ if side == "forward" else READ_BACKWARD

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for parameter, value in bound.arguments.items():
            default = signature.parameters[parameter].default
            unused = None if default is inspect.Parameter.empty else default
            assert parameter in read or value is unused or value == unused, f"{parameter}={value!r}"
        return compute(bound.arguments)

    if not recorded["operators"]:
        function.__signature__ = signature
        return function
    written = () if side == "forward" else ("dq", "dk", "dv")
    schema = torch.library.infer_schema(scope["function"], mutates_args=written)
    place = "".join(letter if letter.isalnum() else "_" for letter in version)
    return torch.library.custom_op(f"{place}::{name}", function, mutates_args=written, schema=schema)


def _returned(recorded, side):
    return f"tuple[{', '.join(['Tensor'] * recorded['forward_returns'])}]" if side == "forward" else "Tensor"
