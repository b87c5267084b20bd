"""`cp.attention` and `cp.positions` on real process groups, against dense attention in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from models import context
from simulated import allowed, dense_attention

from hf_context_parallel import mask as masks

SCALE = 0.37


def padding(length: int) -> torch.Tensor:
    """A padding mask of two rows: left and right of the first, inside the second."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :4] = mask[0, -3:] = mask[1, 5:9] = 0
    return mask


CASES = {
    "causal": {},
    "bidirectional": {"causal": False},
    "documents": {"cu_seqlens": torch.tensor([0, 0, 1, 12, 12, 15, 29])},
    "bidirectional documents": {"cu_seqlens": torch.tensor([0, 7, 29]), "causal": False},
    "padding": {"attention_mask": padding(29)},
    "bidirectional padding": {"attention_mask": padding(29), "causal": False},
}


def largest_error(case: str, heads: tuple[int, int], dims: tuple[int, int], options: dict) -> float:
    """Of the output and the gradients of q, k and v, over 29 tokens that no group of 2, 3 or 4 divides."""
    cp, length, arguments = context(**options), 29, CASES[case]
    random = torch.Generator().manual_seed(3)
    shapes = [(heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1])]
    *leaves, grad = (torch.randn(2, length, *shape, generator=random, dtype=torch.float64) for shape in shapes)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    if "cu_seqlens" in arguments:
        rows = (masks.from_cu_seqlens(arguments["cu_seqlens"], length),) * 2
    elif "attention_mask" in arguments:
        rows = masks.from_attention_mask(arguments["attention_mask"])
    else:
        rows = masks.whole_rows(2, length)
    visible = allowed(masks.Mask(length, rows, arguments.get("causal", True)))
    expected, _ = dense_attention(*leaves, visible, SCALE)
    expected.backward(grad)

    positions = cp.positions(length, arguments.get("cu_seqlens"))
    mine = [leaf.detach()[:, positions].transpose(1, 2).requires_grad_() for leaf in leaves]
    found = cp.attention(*mine, scale=SCALE, **arguments)
    found.backward(grad[:, positions].transpose(1, 2))
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(mine, leaves))]
    return max((a.transpose(1, 2) - b[:, positions]).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_exact(on_ranks, ranks, case):
    assert max(on_ranks(ranks, largest_error, case, (4, 2), (8, 8), {})) < 1e-10


@pytest.mark.parametrize(
    ("heads", "dims", "options"),
    [
        ((3, 3), (8, 8), {"layout": "contiguous"}),
        ((6, 1), (8, 8), {"kernel": "reference"}),
        ((3, 1), (12, 5), {}),
        ((6, 3), (5, 12), {"layout": "contiguous"}),
    ],
)
def test_attention_is_exact_for_other_heads_layouts_and_kernels(on_ranks, heads, dims, options):
    for case in ("causal", "bidirectional documents", "padding"):
        assert max(on_ranks(3, largest_error, case, heads, dims, options)) < 1e-10


def default_scale_error() -> float:
    cp = context()
    q, k, v = torch.randn(3, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    mine = [x[:, :, cp.positions(6)] for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return (cp.attention(*mine) - expected[:, :, cp.positions(6)]).abs().max().item()


def test_the_default_scale_is_that_of_sdpa(on_ranks):
    assert max(on_ranks(2, default_scale_error)) < 1e-6


def test_positions_partition_the_sequence(on_ranks):
    parts = on_ranks(3, positions_of_a_rank, 20)
    assert sorted(position for part in parts for position in part) == list(range(20))


def positions_of_a_rank(length: int) -> list[int]:
    return context().positions(length).tolist()


def refusal(case: str) -> str:
    cp, rank = context(), dist.get_rank()
    q = torch.zeros(1, 2, len(cp.positions(12)), 4)
    k = v = q[:, :1]
    options = {}
    if case == "one token too many" and rank == 1:
        q, k, v = (torch.zeros(1, heads, q.shape[2] + 1, 4) for heads in (2, 1, 1))
    if case == "heads that do not divide" and rank == 0:
        q = torch.zeros(1, 3, q.shape[2], 4)
        k = v = q[:, :2]
    if case == "three dimensions":
        q = q[0]
    if case == "arguments differ":
        options = {"causal": rank == 0}
    if case == "documents of another length":
        options = {"cu_seqlens": torch.tensor([0, 5])}
    if case == "mask of a shard":
        options = {"attention_mask": torch.ones(1, q.shape[2])}
    if case == "mask and documents":
        options = {"attention_mask": torch.ones(1, 12), "cu_seqlens": torch.tensor([0, 12])}
    if case == "integers":
        q, k, v = q.int(), k.int(), v.int()
    try:
        cp.attention(q, k, v, **options)
    except ValueError as caught:
        return str(caught)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("one token too many", "deals them [5, 4, 4]"),
        ("heads that do not divide", "rank 0 of the group: k and v must have as many heads"),
        ("three dimensions", "must be [B, H, S_local, D]"),
        ("arguments differ", "ranks 0 and 1 of the group have different arguments"),
        ("documents of another length", "must ascend from 0 to the row's length of 12"),
        ("mask of a shard", "it must be of the whole sequence, (1, 12)"),
        ("mask and documents", "exclude each other"),
        ("integers", "not torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank_alike(on_ranks, case, message):
    messages = on_ranks(3, refusal, case)
    assert len(set(messages)) == 1 and message in messages[0], messages


def autocast_dtypes() -> tuple[str, str, set[str]]:
    """Dtypes of the output, of the gradient of q, and on the wire, for float32 and bfloat16 inputs under autocast."""
    cp = context()
    wire, post = set(), cp.exchange.post

    def noting(sends, receives):
        wire.update(str(tensor.dtype) for _, tensor in (*sends, *receives))
        return post(sends, receives)

    cp.exchange.post = noting
    q, k = torch.randn(2, 1, 2, 3, 4).requires_grad_().unbind()
    v = torch.randn(1, 2, 3, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = cp.attention(q, k, v)
    (gradient,) = torch.autograd.grad(output.float().sum(), q)
    return str(output.dtype), str(gradient.dtype), wire


def test_autocast_decides_the_dtype_of_what_travels(on_ranks):
    for output, gradient, wire in on_ranks(2, autocast_dtypes):
        assert output == "torch.bfloat16" and gradient == "torch.float32"
        assert wire == {"torch.bfloat16", "torch.float32"}  # keys and values; and sums of their gradients
