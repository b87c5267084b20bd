"""Calls of kernels, and their results by the definition of attention."""

import torch
from hypothesis import strategies as st

from hf_context_parallel.attention.merge import merge_rows
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.distributed.rows import Rows
from hf_context_parallel.planning.tiles import CAUSAL, Band, Segments
from tests.helpers.simulated import dense_attention, in_band

SCALE = 0.3
SOFTCAP = 1.5
TOKENS = 23
own = ((0, 6), (7, 8), (9, 20))


uneven = ((0, 5), (6, 7), (9, 20)), ((3, 10), (0, 1), (10, 23))


CALLS = {
    "a tile": [Segments(((0, 7),), ((2, 20),))],
    "a causal tile": [Segments(((3, 20),), ((3, 20),), CAUSAL)],
    "several tiles": [Segments(*uneven)],
    "several causal tiles": [Segments(own, own, CAUSAL)],
    "neighbours": [Segments(((2, 5), (5, 9)), ((0, 4), (4, 11)))],
    "tiles that share keys": [Segments(((0, 4), (4, 9)), ((0, 3), (0, 8)))],
    "queries that read in several calls": [
        Segments(own, own, CAUSAL),
        Segments(own[1:], (own[0], own[1])),
        Segments(own[2:], own[:1]),
    ],
    "single tokens": [Segments(((1, 2), (4, 5)), ((1, 2), (4, 5)), CAUSAL), Segments(((4, 5),), ((1, 2),))],
    "causal tiles of more keys": [Segments(*uneven, CAUSAL)],
    "windows": [Segments(own, own, Band(4, 0))],
    "windows of more keys": [Segments(*uneven, Band(4, 0))],
    "windows of more queries": [Segments(((0, 5), (9, 20)), ((3, 10), (10, 18)), Band(2, 3))],
    "windows ahead": [Segments(((0, 5), (9, 20)), ((3, 10), (10, 18)), Band(0, None))],
    "windows of few keys": [Segments(((0, 9), (10, 12)), ((3, 6), (8, 9)), Band(1, None))],
    "windows of few keys ahead": [Segments(((0, 9), (10, 12)), ((3, 6), (8, 9)), Band(None, 6))],
    "queries that read in several windows": [
        Segments(own, own, Band(3, 0)),
        Segments(((10, 19),), ((0, 6),), Band(1, 8)),
    ],
}
SHAPES = {
    "equal heads": (3, 3, 8, 8),
    "grouped": (6, 2, 16, 16),
    "one key head": (4, 1, 8, 8),
    "narrow values": (4, 2, 12, 5),
    "wide values": (4, 2, 3, 16),
    "two of 8 wide": (2, 2, 40, 24),
}
LATENT = {"latent": (2, 2, 192, 128), "grouped latent": (4, 2, 192, 128)}
"""Head dims of multi-head latent attention, which some kernels take as they are."""
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest norm of an error, relative to the norm of the expected tensor."""


def tensors(shape, dtype, device="cpu"):
    """Draw query, key, value and the gradient of the output. Key and value are views of one tensor, as in a ring."""
    heads, key_heads, dim, value_dim = shape
    random = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(TOKENS, *sizes, generator=random, dtype=torch.float64).to(device, dtype)

    key_value = normal(key_heads, dim + value_dim)
    return normal(heads, dim), key_value[..., :dim], key_value[..., dim:], normal(heads, value_dim)


def by_definition(calls, scores, query, key, value, grad):
    """Compute output, LSE and gradients of query, key and value for all calls together, by definition, in float64."""
    seen = torch.zeros(1, TOKENS, TOKENS, dtype=torch.bool)
    for call in calls:
        for (q0, q1), (k0, k1) in zip(call.queries, call.keys):
            tile = in_band(q1 - q0, k1 - k0, call.band)
            assert not (seen[0, q0:q1, k0:k1] & tile).any()
            seen[0, q0:q1, k0:k1] |= tile
    leaves = [x.double()[None].requires_grad_() for x in (query, key, value)]
    output, lse = dense_attention(*leaves, seen, scores.scale, scores.softcap)
    output.backward(grad.double()[None])
    return [x[0].detach() for x in (output, lse, *(leaf.grad for leaf in leaves))]


def by_kernel(kernel, calls, scores, query, key, value, grad):
    """Compute the same by a kernel: merge the outputs of the calls, and add up their gradients."""
    exact = torch.promote_types(query.dtype, torch.float32)
    output, lse = torch.zeros_like(grad, dtype=exact), torch.full(query.shape[:2], float("-inf"), dtype=exact)
    for call in calls:
        part, part_lse = kernel.forward(query, key, value, call, scores)
        assert part.dtype in (query.dtype, exact) and part_lse.dtype == exact
        everything = Rows.of_runs([(0, len(part))])
        merge_rows(output, part, output, lse, part_lse, Rows.of_runs(call.query_runs), everything)
    grads = [torch.zeros_like(x, dtype=exact) for x in (query, key, value)]
    for call in calls:
        shares = kernel.backward(grad, query, key, value, output.to(query.dtype), lse, call, scores)
        for total, share, ranges in zip(grads, shares, (call.queries, call.keys, call.keys)):
            index = torch.cat([torch.arange(*interval) for interval in ranges])
            assert share.shape == (len(index), *total.shape[1:])
            total.index_add_(0, index, share.to(exact))
    return output, lse, *grads


def check(kernel, calls, shape, dtype, softcap=None, least=0.0):
    """Compare a kernel with the definition. Errors are relative to the norm, or to `least` if that is larger."""
    calls = CALLS[calls] if isinstance(calls, str) else calls
    arguments = calls, Scores(SCALE, softcap), *tensors({**SHAPES, **LATENT}[shape], dtype)
    names = ("output", "lse", "dq", "dk", "dv")
    for name, got, expected in zip(names, by_kernel(kernel, *arguments), by_definition(*arguments)):
        read = expected.isfinite()
        assert got.isfinite().equal(read), name
        error = (got.double() - expected)[read].norm() / max(expected[read].norm(), least)
        assert error <= TOLERANCE[dtype], name


limits = st.none() | st.integers(0, 15)
