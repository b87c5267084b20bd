"""Tests of `cp.attention` and `cp.positions` on real process groups, against dense attention in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from hf_context_parallel import ContextParallel
from hf_context_parallel.config import ContextParallelConfig
from hf_context_parallel.functional import layout_of
from hf_context_parallel.integration.active_batch import active_batch
from hf_context_parallel.planning import balanced
from hf_context_parallel.planning import mask as masks
from hf_context_parallel.planning.balanced import make_layout
from tests.helpers.models import context, document_positions, tokens
from tests.helpers.simulated import allowed, dense_attention

SCALE = 0.37


def padding(length: int) -> torch.Tensor:
    """Make a padding mask of two rows, with padding on the left and right of the first, and inside the second."""
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
    "window": {"sliding_window": 4},
    "window of documents": {"sliding_window": 9, "cu_seqlens": torch.tensor([0, 7, 29])},
    "bidirectional window": {"sliding_window": 5, "causal": False, "attention_mask": padding(29)},
    "chunks of documents": {"chunk_size": 5, "cu_seqlens": torch.tensor([0, 7, 8, 29])},
    "chunks of padding": {"chunk_size": 6, "attention_mask": padding(29)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True, "attention_mask": padding(29)},
    "everything": {
        "cu_seqlens": torch.tensor([0, 7, 29]),
        "sliding_window": 6,
        "chunk_size": 11,
        "softcap": 1.5,
        "sinks": True,
        "deterministic": True,
    },
    "everything bidirectional": {
        "attention_mask": padding(29),
        "causal": False,
        "sliding_window": 4,
        "chunk_size": 13,
        "softcap": 1.5,
        "sinks": True,
    },
}


def largest_error(case: str, heads: tuple[int, int], dims: tuple[int, int], options: dict) -> float:
    """Compute the largest error of the output and of the gradients of q, k, v and sinks.

    The 29 tokens cannot be shared equally by groups of 2, 3 or 4 ranks.
    """
    cp, length, arguments = context(**options), 29, dict(CASES[case])
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
    pattern = {name: arguments[name] for name in masks.Pattern._fields if name in arguments}
    visible = allowed(masks.Mask(length, rows, masks.Pattern(**pattern)))
    scores, sinks = torch.randn(heads[0], generator=random, dtype=torch.float64), None
    if arguments.get("sinks"):
        arguments["sinks"], sinks = (scores.clone().requires_grad_() for _ in range(2))
    expected, _ = dense_attention(*leaves, visible, SCALE, arguments.get("softcap"), sinks)
    expected.backward(grad)

    positions = cp.positions(length, arguments.get("cu_seqlens"))
    mine = [leaf.detach()[:, positions].transpose(1, 2).requires_grad_() for leaf in leaves]
    found = cp.attention(*mine, scale=SCALE, **arguments)
    found.backward(grad[:, positions].transpose(1, 2))
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(mine, leaves))]
    errors = [a.transpose(1, 2) - b[:, positions] for a, b in pairs]
    if sinks is not None:
        total = arguments["sinks"].grad
        if dist.is_initialized():
            dist.all_reduce(total)
        errors.append(total - sinks.grad)
    return max(error.abs().max().item() for error in errors)


def error_in_a_balanced_batch(layout: str) -> float:
    """Compute the largest error of attention in the block of a batch whose documents were dealt with small chunks.

    The call has one document more than the batch, the padding of the layout. So a layout made for the documents of
    the call would be another.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balanced, "FINEST", 1)
        patch.setattr(balanced, "LEAST", 1)
        cp, edges = context(layout=layout), [0, 7, 29, 45]
        position_ids = document_positions(*(stop - start for start, stop in zip(edges, edges[1:])))
        with cp.shard({"input_ids": tokens(1, 45), "position_ids": position_ids}):
            dealt = active_batch().shard.layout
            assert len(dealt.chunk_owners) > 2 * cp.size and dealt.length > 45
            cu_seqlens = torch.tensor([*edges, dealt.length])
            positions = cp.positions(dealt.length, cu_seqlens)
            assert positions.equal(dealt.positions(cp.rank)) and positions.equal(cp.positions(dealt.length))
            random = torch.Generator().manual_seed(3)
            whole = [torch.randn(1, dealt.length, 2, 8, generator=random, dtype=torch.float64) for _ in range(3)]
            rows = (masks.from_cu_seqlens(cu_seqlens, dealt.length),)
            expected, _ = dense_attention(*whole, allowed(masks.Mask(dealt.length, rows)), SCALE)
            mine = [tensor[:, positions].transpose(1, 2) for tensor in whole]
            found = cp.attention(*mine, scale=SCALE, cu_seqlens=cu_seqlens)
            return (found.transpose(1, 2) - expected[:, positions]).abs().max().item()


@pytest.mark.parametrize("layout", ["auto", "balanced"])
def test_attention_in_a_batch_takes_its_layout(on_ranks, layout):
    assert max(on_ranks(2, error_in_a_balanced_batch, layout)) < 1e-10


def test_positions_outside_of_a_batch_depend_on_the_length_alone():
    length, documents = 3 << 12, torch.tensor([0, 9000, 3 << 12])
    by_layout = {
        layout: make_layout(layout, length, 3, masks.from_cu_seqlens(documents, length))
        for layout in ("auto", "zigzag")
    }
    assert by_layout["auto"] != by_layout["zigzag"]
    group = SimpleNamespace(config=ContextParallelConfig(size=3), size=3)
    assert layout_of(group, length, masks.from_cu_seqlens(documents, length)) == by_layout["zigzag"]


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
        ((4, 4), (24, 16), {}),  # as in multi-head latent attention
        ((6, 3), (8, 8), {"comm_type": "p2p", "head_groups": 2}),
        ((12, 6), (8, 8), {"comm_type": "a2a", "head_groups": 2}),
    ],
)
def test_attention_is_exact_for_other_heads_layouts_and_kernels(on_ranks, heads, dims, options):
    for case in ("causal", "bidirectional documents", "padding", "everything", "everything bidirectional"):
        assert max(on_ranks(3, largest_error, case, heads, dims, options)) < 1e-10


def differences_compiled(groups: int) -> list[float]:
    """Compare attention of compiled code, output and gradients, with that of code that is not."""
    cp, found = context(comm_type="p2p", head_groups=groups), []
    whole = torch.randn(3, 1, 4, 24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def twice(*qkv):
        return cp.attention(*qkv) * 2

    for run in (twice, torch.compile(twice, backend="eager")):
        leaves = [x[:, :, cp.positions(24)].clone().requires_grad_() for x in whole]
        output = run(*leaves)
        output.pow(2).sum().backward()
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    return [(a - b).abs().max().item() for a, b in zip(*found)]


@pytest.mark.parametrize("groups", [1, 2])
def test_compiled_code_may_call_attention(on_ranks, groups):
    assert max(map(max, on_ranks(2, differences_compiled, groups))) == 0


def default_scale_error() -> float:
    cp = context()
    q, k, v = torch.randn(3, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    mine = [x[:, :, cp.positions(6)] for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return (cp.attention(*mine) - expected[:, :, cp.positions(6)]).abs().max().item()


def test_the_default_scale_is_that_of_sdpa(on_ranks):
    assert max(on_ranks(2, default_scale_error)) < 1e-6


def two_layers(cp, checkpointing: bool, seed: int, **options) -> list[torch.Tensor]:
    """Seed, run attention on the output of attention, and return this rank's output and gradients."""
    random = torch.Generator().manual_seed(0)
    whole = torch.randn(3, 1, 2, 24, 4, generator=random)
    leaves = [x[:, :, cp.positions(24)].clone().requires_grad_() for x in whole]
    torch.manual_seed(seed)

    def attend(*qkv):
        return cp.attention(*qkv, **options)

    q, k, v = leaves
    for _ in range(2):
        arguments = q, k, v
        v = checkpoint(attend, *arguments, use_reentrant=False) if checkpointing else attend(*arguments)
    (v * torch.randn(v.shape, generator=random)).sum().backward()
    return [v.detach(), *(leaf.grad for leaf in leaves)]


def same_bits(seeds: list[int], checkpointing: list[bool], options: dict) -> list[bool]:
    """Compare two runs bit by bit. The lists say the seed of each run, and whether it recomputes attention."""
    first, second = (two_layers(context(), *how, **options) for how in zip(checkpointing, seeds))
    return [x.equal(y) for x, y in zip(first, second)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_recomputation_drops_the_same_weights(on_ranks, ranks):
    options = {"dropout_p": 0.4, "sliding_window": 9}
    assert all(map(all, on_ranks(ranks, same_bits, [5, 5], [False, True], options)))
    assert not any(map(any, on_ranks(ranks, same_bits, [5, 6], [False, False], options)))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sliding_window": 5}])
def test_what_is_deterministic_has_the_same_bits_again(on_ranks, options):
    options = {"deterministic": True, **options}
    assert all(map(all, on_ranks(3, same_bits, [0, 0], [False, False], options)))


def left_out(seeded_by_rank: bool) -> list[list]:
    """Find this rank's keys that each of its queries does not read, in two calls after one seed."""
    cp, held = context(), 16
    q, k = torch.zeros(2, 1, 1, held, 4).unbind()
    torch.manual_seed(dist.get_rank() if seeded_by_rank else 0)
    told = torch.zeros(1, 1, held, cp.size, held)  # values that make the outputs the weights of the keys
    told[0, 0, :, cp.rank] = torch.eye(held)
    calls = [cp.attention(q, k, told.flatten(3), causal=False, dropout_p=0.5) for _ in range(2)]
    return [(call.unflatten(3, (cp.size, held))[0, 0, :, cp.rank] == 0).tolist() for call in calls]


@pytest.mark.parametrize("seeded_by_rank", [False, True])
def test_dropout_differs_between_ranks_and_calls(on_ranks, seeded_by_rank):
    patterns = [tuple(map(tuple, call)) for rank in on_ranks(3, left_out, seeded_by_rank) for call in rank]
    assert len(set(patterns)) == 6
    share = sum(map(sum, sum(patterns, ()))) / (6 * 16 * 16)
    assert 0.4 < share < 0.6


def test_positions_partition_the_sequence(on_ranks):
    parts = on_ranks(3, positions_of_a_rank, 20)
    assert sorted(position for part in parts for position in part) == list(range(20))


def positions_of_a_rank(length: int) -> list[int]:
    return context().positions(length).tolist()


REFUSED = {
    "window of 0": {"sliding_window": 0},
    "window of a float": {"sliding_window": 4.0},
    "chunks of -1": {"chunk_size": -1},
    "softcap of 0": {"softcap": 0.0},
    "dropout of all": {"dropout_p": 1.0},
    "sinks of other heads": {"sinks": torch.zeros(3)},
    "sinks of every query": {"sinks": torch.zeros(2, 4)},
}
DIFFERENT = {
    "causal": False,
    "sliding_window": 4,
    "chunk_size": 4,
    "softcap": 2.0,
    "sinks": torch.zeros(2),
    "scale": 0.1,
    "dropout_p": 0.5,
    "deterministic": True,
}


def refusal(case: str) -> str:
    cp, rank = context(), dist.get_rank()
    q = torch.zeros(1, 2, len(cp.positions(12)), 4)
    k = v = q[:, :1]
    options = dict(REFUSED.get(case, {}))
    if case in DIFFERENT and rank == 2:
        options = {case: DIFFERENT[case]}
    if case == "one token too many" and rank == 1:
        q, k, v = (torch.zeros(1, heads, q.shape[2] + 1, 4) for heads in (2, 1, 1))
    if case == "heads that do not divide" and rank == 0:
        q = torch.zeros(1, 3, q.shape[2], 4)
        k = v = q[:, :2]
    if case == "three dimensions":
        q = q[0]
    if case == "sinks of other heads on one rank":
        options = {"sinks": torch.zeros(2 + rank // 2)}
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
        ("heads that do not divide", "rank 0 of the group: the heads of q, k and v do not fit together"),
        ("three dimensions", "Give tensors [B, H, S_local, D]"),
        ("documents of another length", "does not ascend from 0 to the row's length of 12"),
        ("mask of a shard", "the whole batch has (1, 12)"),
        ("mask and documents", "exclude each other"),
        ("integers", "not torch.int32"),
        ("window of 0", "sliding_window=0 is not a number of tokens"),
        ("window of a float", "sliding_window=4.0 is not a number of tokens"),
        ("chunks of -1", "chunk_size=-1 is not a number of tokens"),
        ("softcap of 0", "softcap=0.0 is not positive and finite"),
        ("dropout of all", "dropout_p=1.0 is out of range"),
        ("sinks of other heads", "sinks has shape (3,). Give one score for each of q's 2 heads"),
        ("sinks of every query", "sinks has shape (2, 4). Give one score for each of q's 2 heads"),
        (
            "sinks of other heads on one rank",
            "rank 2 of the group: sinks has shape (3,). Give one score for each of q's 2 heads",
        ),
        *((name, "ranks 0 and 2 of the group have different arguments") for name in DIFFERENT),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank_alike(on_ranks, case, message):
    messages = on_ranks(3, refusal, case)
    assert len(set(messages)) == 1 and message in messages[0], messages


def autocast_dtypes() -> tuple[str, str, set[str]]:
    """Return the dtypes of the output, the gradient of q, and the messages, for mixed inputs under autocast."""
    cp = context(comm_type="p2p")  # gradients of keys travel in float32
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
        assert wire == {"torch.bfloat16", "torch.float32"}  # keys and values, and sums of their gradients


def test_one_call_of_attention_has_one_way():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"comm_type=\['all_gather'\] is not one of 'p2p', 'all_gather'"):
        ContextParallel(ContextParallelConfig()).attention(q, q, q, comm_type=["all_gather"])


def test_attention_does_not_ignore_the_documents_of_an_open_batch():
    cp = context()
    q = torch.randn(1, 2, 12, 8, dtype=torch.float64)
    packed = {"input_ids": tokens(1, 12), "position_ids": document_positions(5, 7)}
    with cp.shard(packed):
        with pytest.raises(ValueError, match="ignores the active batch"):
            cp.attention(q, q, q)
        said = cp.attention(q, q, q, cu_seqlens=torch.tensor([0, 5, 12]))
    assert said.equal(cp.attention(q, q, q, cu_seqlens=torch.tensor([0, 5, 12])))
    with cp.shard({"input_ids": tokens(1, 12)}):
        cp.attention(q, q, q)
