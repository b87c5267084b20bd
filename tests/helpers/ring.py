"""Comparison of attention on simulated ranks with dense attention in float64, for masks of every kind."""

import pytest
import torch

from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows
from tests.helpers.simulated import SimulatedExchange, allowed, cut, dense_attention, padded, run

SCALE = 0.3
PLAIN = Scores(SCALE)
KERNELS = ("cpu", "reference")
"""Kernels that run on a CPU."""
EIGHT = pytest.param(8, marks=pytest.mark.exhaustive)
SIZES = (1, 2, 3, 4, EIGHT)


def tensors(mask, heads=4, key_heads=2, dim=8, value_dim=8, dtype=torch.float64, seed=0):
    """Draw query, key, value and the gradient of the output for whole rows, `[B, S, H, D]` each."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(len(mask.rows), mask.length, *shape, generator=random, dtype=torch.float64).to(dtype)
        for shape in ((heads, dim), (key_heads, dim), (key_heads, value_dim), (heads, value_dim))
    ]


def dense(mask, query, key, value, grad, scores=PLAIN, sinks=None, kept=None):
    """Compute output and gradients of query, key, value (and sinks) by definition, in float64."""
    inputs = [query, key, value, *([] if sinks is None else [sinks])]
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    output, _ = dense_attention(*leaves[:3], allowed(mask), scores.scale, scores.softcap, *leaves[3:] or [None], kept)
    output.backward(grad.double())
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def share(layout, rank, x):
    """Take the tokens of a rank from `[B, S, H, D]`, as `[B * S_local, H, D]`."""
    return x[:, layout.positions(rank)].flatten(0, 1)


def on_rank(
    exchange,
    layout,
    mask,
    whole,
    kernel,
    prepare=lambda x: x,
    scores=PLAIN,
    sinks=None,
    way=("p2p", 1),
    together=1,
    groups=1,
):
    """Compute output and gradients of query, key, value (and sinks) on one rank."""
    query, key, value, grad = (prepare(share(layout, exchange.rank, x)) for x in whole)
    inputs = [query, key, value, *([] if sinks is None else [sinks])]
    leaves = [x.detach().requires_grad_() for x in inputs]
    strategy = build_strategy(*way, layout, mask, exchange.rank, together, groups)
    how = {"exchange": exchange, "kernel": kernel, "scores": scores, "sinks": None if sinks is None else leaves[3]}
    output = attention(*leaves[:3], strategy=strategy, **how)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def ring(layout, mask, whole, kernel="cpu", prepare=lambda x: x, exchange=SimulatedExchange, **how):
    """Run all ranks of a group, and gather output and gradients of query, key and value to whole rows.

    Gradients of sinks are summed over ranks.
    """
    kernel = choose_kernel(kernel, "cpu")

    def work(mine):
        return on_rank(mine, layout, mask, whole, kernel, prepare, **how)

    shards = run(layout.size, work, exchange=exchange)
    results = []
    for index, like in enumerate((whole[3], *whole[:3])):
        result = torch.full_like(like, float("nan"))
        for rank, shard in enumerate(shards):
            result[:, layout.positions(rank)] = shard[index].view(len(mask.rows), -1, *like.shape[2:])
        results.append(result)
    return [*results, *(torch.stack(parts).sum(0) for parts in list(zip(*shards))[4:])]


NAMES = ("output", "dq", "dk", "dv", "dsinks")


def check(
    layout,
    mask,
    whole,
    kernel="cpu",
    prepare=lambda x: x,
    kept=None,
    way=("p2p", 1),
    together=1,
    groups=1,
    exchange=SimulatedExchange,
    **how,
):
    """Assert that the ranks compute the same as dense attention."""
    expected = dense(mask, *whole, **how, kept=kept)
    found = ring(layout, mask, whole, kernel, prepare, exchange, way=way, together=together, groups=groups, **how)
    for name, got, truth in zip(NAMES, found, expected):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


LENGTH = 61
PADDED_ROWS = (
    padded([position >= 23 for position in range(LENGTH)]),
    padded([position < 23 for position in range(LENGTH)]),
    padded([position % 7 != 3 for position in range(LENGTH)]),
    (),  # padding only
)
MASKS = {
    "one document": Mask(LENGTH, whole_rows(2, LENGTH)),
    "bidirectional": Mask(LENGTH, (cut([20, 41], LENGTH), *whole_rows(1, LENGTH)), Pattern(causal=False)),
    "documents of 0, 1 and odd lengths": Mask(LENGTH, (cut([0, 1, 2, 2, 9, 20, 20, 60], LENGTH),)),
    "longer than a shard": Mask(LENGTH, (cut([5, 50], LENGTH), cut([30], LENGTH))),
    "hundreds of tiny documents": Mask(400, (cut(range(0, 400, 2), 400), cut(range(1, 400, 3), 400))),
    "padding left, right, inside and everywhere": Mask(LENGTH, PADDED_ROWS),
    "window": Mask(LENGTH, (cut([20, 41], LENGTH), *whole_rows(1, LENGTH)), Pattern(sliding_window=9)),
    "bidirectional window": Mask(LENGTH, (cut([50], LENGTH), *PADDED_ROWS), Pattern(False, sliding_window=6)),
    "blocks": Mask(
        LENGTH,
        (cut([50], LENGTH), cut([20, 41], LENGTH), *PADDED_ROWS[:1]),
        Pattern(sliding_window=9, blocks=((((3, 30),),), (((0, 9), (15, 25)), ((30, 60),)), (((2, 40),),))),
    ),
    "chunks": Mask(LENGTH, (cut([0, 1, 30, 41], LENGTH), *PADDED_ROWS), Pattern(chunk_size=11)),
    "bidirectional windows in chunks": Mask(LENGTH, (cut([7, 30], LENGTH), *PADDED_ROWS), Pattern(False, 5, 12)),
    "shorter than the chunks": Mask(3, whole_rows(2, 3)),
    "one token": Mask(1, whole_rows(1, 1)),
}
SHAPES = {
    "equal heads": {"heads": 3, "key_heads": 3},
    "grouped": {"heads": 6, "key_heads": 2},
    "one key head": {"heads": 4, "key_heads": 1},
    "narrow values": {"dim": 12, "value_dim": 5},
    "wide values": {"dim": 3, "value_dim": 16},
}


def some_sinks(heads, seed=1):
    """Draw a sink for each head, some far above the scores of keys and some far below."""
    return 4 * torch.randn(heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HOW = {
    "softcap": {"scores": Scores(SCALE, softcap=1.2)},
    "sinks": {"sinks": some_sinks(4)},
    "softcap and sinks": {"scores": Scores(SCALE, softcap=1.2), "sinks": some_sinks(4)},
}


def every_second_element(x: torch.Tensor) -> torch.Tensor:
    """Lay a tensor out with a stride of 2 in its last dimension, and NaN between."""
    return torch.stack((x, torch.full_like(x, float("nan"))), dim=-1)[..., 0]
