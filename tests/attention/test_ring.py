"""Tests of ring attention on simulated groups, compared with dense attention in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.attention import ring as planned_ring
from hf_context_parallel.attention.executor import attention
from hf_context_parallel.attention.kernels import cpu, reference
from hf_context_parallel.attention.kernels.registry import choose_kernel
from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.attention.strategy import build_strategy
from hf_context_parallel.planning.layout import contiguous, zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows
from tests.helpers.examples import examples
from tests.helpers.ring import (
    EIGHT,
    HOW,
    MASKS,
    PLAIN,
    SCALE,
    SHAPES,
    SIZES,
    check,
    dense,
    on_rank,
    ring,
    share,
    some_sinks,
    tensors,
)
from tests.helpers.simulated import SMALL, Log, SimulatedExchange, allowed, cases, padded, run

KERNELS = ("cpu", "reference")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, size, kernel):
    mask = MASKS[name]
    check(zigzag(mask.length, size), mask, tensors(mask), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1, 3, EIGHT])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, size, kernel):
    mask = MASKS["longer than a shard"]
    check(zigzag(mask.length, size), mask, tensors(mask, **SHAPES[name]), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1, 2, 3, EIGHT])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "name", ["longer than a shard", "padding left, right, inside and everywhere", "window", "chunks"]
)
def test_scores_and_sinks(name, how, size, kernel):
    mask = MASKS[name]
    check(zigzag(mask.length, size), mask, tensors(mask), kernel, **HOW[how])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_windows_about_as_long_as_a_chunk_or_a_shard(size, causal):
    tokens = 48 // size
    layout = zigzag(48, size)
    lengths = {1, 2, 47, 48, *(whole + more for whole in (tokens // 2, tokens, 2 * tokens) for more in (-1, 0, 1))}
    for window in lengths - {0}:
        mask = Mask(48, (*whole_rows(1, 48), padded([6 <= position != 30 for position in range(48)])))
        mask = Mask(48, mask.rows, Pattern(causal, window))
        check(layout, mask, tensors(mask, heads=2, key_heads=1, dim=3, value_dim=3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("score", [20.0, -20.0])
@pytest.mark.parametrize("size", [1, 3])
def test_large_sinks(size, score, dtype):
    """Compare a sink with nearly all the weight, and one with nearly none that float64 still resolves."""
    mask, sinks = MASKS["longer than a shard"], torch.full((4,), score, dtype=dtype)
    whole = tensors(mask, dtype=dtype)
    found = ring(zigzag(mask.length, size), mask, whole, sinks=sinks)
    for got, truth in zip(found, dense(mask, *whole, sinks=sinks)):
        assert (got.double() - truth).norm() <= (1e-12 if dtype == torch.float64 else 1e-2) * truth.norm() != 0
    for got, without in zip(found, dense(mask, *whole)):
        least = 0.99 if score > 0 else 1e-10 if dtype == torch.float64 else 0
        assert (got.double() - without).norm() >= least * without.norm()


def fuzz(case, kernel, key_heads, group, dims, softcap, with_sinks):
    layout, mask = case
    heads = key_heads * group
    sinks = some_sinks(heads) if with_sinks else None
    whole = tensors(mask, heads, key_heads, *dims)
    check(layout, mask, whole, kernel, scores=Scores(SCALE, softcap), sinks=sinks)


anything = given(
    cases(max_length=60),
    st.sampled_from(KERNELS),
    st.integers(1, 2),
    st.integers(1, 3),
    st.tuples(SMALL, SMALL),
    st.sampled_from([None, 0.3, 2.0]),
    st.booleans(),
)


@examples(75)
@anything
def test_anything(case, kernel, key_heads, group, dims, softcap, with_sinks):
    fuzz(case, kernel, key_heads, group, dims, softcap, with_sinks)


@pytest.mark.exhaustive
@examples(1500)
@anything
def test_anything_exhaustively(case, kernel, key_heads, group, dims, softcap, with_sinks):
    fuzz(case, kernel, key_heads, group, dims, softcap, with_sinks)


@pytest.mark.parametrize("value_dim", [5, 12])
@pytest.mark.parametrize("name", MASKS)
def test_the_cpu_operators_get_nothing_that_they_mistake(name, value_dim, monkeypatch):
    """Check all tensors: not empty, of one head dim and dtype, with a last stride of 1, and with finite LSEs."""
    calls = []

    def careful(operator):
        def checked(*arguments, **named):
            found = [x for x in arguments if isinstance(x, torch.Tensor)]
            query, key, *others = found if operator is forward else found[1:]
            heads_first = [x for x in found if x.dim() == 4]
            assert query.shape[1] % key.shape[1] == 0
            assert all(x.numel() and x.stride(-1) == 1 and x.shape[-1] == query.shape[-1] for x in heads_first)
            assert {x.dtype for x in heads_first} == {torch.float32}
            assert operator is forward or (others[-1].dim() == 3 and others[-1].isfinite().all())
            calls.append(operator)
            return operator(*arguments, **named)

        return checked

    forward = cpu._forward
    monkeypatch.setattr(cpu, "_forward", careful(cpu._forward))
    monkeypatch.setattr(cpu, "_backward", careful(cpu._backward))
    mask = MASKS[name]
    whole = tensors(mask, dim=12, value_dim=value_dim, dtype=torch.bfloat16)
    assert all(x.isfinite().all() for x in ring(zigzag(mask.length, 3), mask, whole, "cpu", every_second_element))
    assert calls.count(forward) == len(calls) / 2 > 0


def test_scores_that_differ_by_hundreds():
    mask = MASKS["one document"]
    query, *others = tensors(mask)
    check(zigzag(mask.length, 4), mask, [query * 100, *others])


def every_second_element(x):
    return torch.stack((x, torch.full_like(x, float("nan"))), dim=-1)[..., 0]


def heads_outside(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("prepare", [every_second_element, heads_outside])
def test_inputs_that_are_not_contiguous(prepare, kernel):
    mask = MASKS["longer than a shard"]
    whole = tensors(mask)
    assert not prepare(whole[0][0]).is_contiguous()
    check(zigzag(mask.length, 3), mask, whole, kernel, prepare)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_of_a_sum_which_has_no_strides(kernel):
    def expanded(x):
        return x.flatten()[:1].expand(x.shape) if (x == 1).all() else x

    mask = MASKS["longer than a shard"]
    *others, grad = tensors(mask)
    assert expanded(torch.ones_like(grad)).stride() == (0,) * grad.dim()
    check(zigzag(mask.length, 3), mask, [*others, torch.ones_like(grad)], kernel, expanded)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_padding_neither_reads_nor_is_read(size, kernel):
    """Put NaN into padding: its output is 0, and no other token changes."""
    mask = MASKS["padding left, right, inside and everywhere"]
    padding = ~allowed(mask).any(2)
    whole = tensors(mask)
    poisoned = [x.masked_fill(padding[..., None, None], float("nan")) for x in whole]
    for got, expected in zip(ring(zigzag(mask.length, size), mask, poisoned, kernel), dense(mask, *whole)):
        assert (got[padding] == 0).all()
        torch.testing.assert_close(got[~padding], expected[~padding], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("how", [{}, HOW["softcap and sinks"]], ids=["", "softcap and sinks"])
@pytest.mark.parametrize("name", ["longer than a shard", "window", "chunks", "bidirectional windows in chunks"])
def test_who_does_not_read_a_token_does_not_notice_it(name, how, kernel):
    """Change one token: no bit changes at tokens that do not read it, on whichever ranks they lie.

    These are tokens of other documents, and tokens outside of its window or chunk."""
    mask = MASKS[name]
    layout, seen = zigzag(mask.length, 4), allowed(mask)
    whole = tensors(mask)
    changed = [x.clone() for x in whole]
    for x in changed:
        x[0, 20] += 1
    readers = seen[:, :, 20] & seen[0, 20].any()
    readers[1:] = False
    touched = (seen & readers[:, :, None]).any(1)  # keys whose gradient depends on a reader's
    assert readers[0, 20] and not readers.all() and not touched.all()
    pairs = zip(ring(layout, mask, whole, kernel, **how), ring(layout, mask, changed, kernel, **how))
    for (before, after), noticing in zip(pairs, (readers, readers, touched, touched)):
        assert after[~noticing].equal(before[~noticing])
        assert not after[0, 20].equal(before[0, 20])


def test_autocast_changes_nothing():
    mask = MASKS["one document"]
    layout, whole = zigzag(mask.length, 2), tensors(mask, dtype=torch.float32)
    kernel = choose_kernel("reference", "cpu")

    def under_autocast(exchange):
        with torch.autocast("cpu", torch.bfloat16):
            return on_rank(exchange, layout, mask, whole, kernel)

    plain = run(2, lambda exchange: on_rank(exchange, layout, mask, whole, kernel))
    for expected, got in zip(plain, run(2, under_autocast)):
        assert all(x.dtype == torch.float32 and x.equal(y) for x, y in zip(got, expected))


def test_the_guard_stops_a_backward_before_it_sends():
    mask = MASKS["one document"]
    layout, whole, logs = zigzag(mask.length, 2), tensors(mask), [Log(), Log()]

    def guard():
        raise RuntimeError("this batch is gone")

    def guarded(exchange):
        leaves = [share(layout, exchange.rank, x).requires_grad_() for x in whole]
        output = attention(
            *leaves[:3],
            strategy=build_strategy("p2p", 1, layout, mask, exchange.rank),
            exchange=logs[exchange.rank].exchange(exchange),
            kernel=choose_kernel("cpu", "cpu"),
            scores=PLAIN,
            guard=guard,
        )
        forward = list(logs[exchange.rank].events)
        with pytest.raises(RuntimeError, match="this batch is gone"):
            output.sum().backward()
        return forward

    assert run(2, guarded) == [log.events for log in logs]


# Tests of dropout.


def read_out(layout, mask, whole, scores, sinks=None):
    """Read the attention weights `[B, H, S, S]` of a group out of its outputs, by one-hot values."""
    query, key, value, grad = whole
    told = torch.eye(mask.length, dtype=query.dtype)[None, :, None].expand(*value.shape[:3], -1)
    unused = grad[..., :1].expand(*grad.shape[:3], mask.length)
    output, *_ = ring(layout, mask, [query, key, told, unused], scores=scores, sinks=sinks)
    return output.transpose(1, 2)


@pytest.mark.parametrize("most", [reference.MOST_SCORES, 60])
@pytest.mark.parametrize("how", [{}, HOW["softcap and sinks"]], ids=["", "softcap and sinks"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "name", ["longer than a shard", "padding left, right, inside and everywhere", "bidirectional windows in chunks"]
)
def test_dropout_leaves_out_the_same_forward_and_backward(name, size, how, most, monkeypatch):
    """Compare all gradients with those of dense attention that drops the same weights as the forward."""
    monkeypatch.setattr(reference, "MOST_SCORES", most)
    mask = MASKS[name]
    layout, whole = zigzag(mask.length, size), tensors(mask)
    how = {**how, "scores": how.get("scores", PLAIN)._replace(dropout_p=0.4, seed=3)}
    seen = allowed(mask)[:, None]
    kept = (read_out(layout, mask, whole, **how) != 0).double() / 0.6
    assert not kept.any(1)[~seen[:, 0]].any() and 0.5 < (kept != 0).sum() / (4 * seen.sum()) < 0.7
    check(layout, mask, whole, **how, kept=kept)


def test_dropout_is_decided_by_its_seed():
    mask = MASKS["longer than a shard"]
    layout, whole = zigzag(mask.length, 3), tensors(mask)
    first, again, other = (
        ring(layout, mask, whole, scores=Scores(SCALE, dropout_p=0.2, seed=seed)) for seed in (1, 1, 2)
    )
    assert all(x.equal(y) for x, y in zip(first, again))
    assert not any(x.equal(y) for x, y in zip(first, other))


@pytest.mark.parametrize("most", [reference.MOST_SCORES, 1])
@pytest.mark.parametrize("layout", [zigzag, contiguous])
def test_dropout_is_another_for_every_query(layout, most, monkeypatch):
    """Check that dropout differs between ranks, rows, heads, queries and owners of keys.

    All ranks have the same seed, so without care they would drop the same weights of every tile."""
    monkeypatch.setattr(reference, "MOST_SCORES", most)
    size, tokens = 3, 48
    mask = Mask(size * tokens, whole_rows(2, size * tokens), Pattern(causal=False))
    layout = layout(mask.length, size)
    kept = read_out(layout, mask, tensors(mask), Scores(SCALE, dropout_p=0.5, seed=4)) != 0
    order = torch.cat([layout.positions(rank) for rank in range(size)])
    tiles = kept[:, :, order][..., order].reshape(-1, tokens)  # pattern of each query over the keys of each rank
    assert len(tiles) == 2 * 4 * size * tokens * size == len(tiles.unique(dim=0))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_is_right_on_average(dropout_p):
    """Check dropout over many seeds: the mean and the spread of the weights, and the share that is dropped."""
    seeds = 300
    mask = Mask(14, whole_rows(1, 14))
    layout, whole, seen = (
        zigzag(14, 2),
        tensors(mask, heads=2, key_heads=1),
        allowed(mask)[:, None].expand(1, 2, 14, 14),
    )
    drawn = torch.stack(
        [read_out(layout, mask, whole, Scores(SCALE, dropout_p=dropout_p, seed=seed)) for seed in range(seeds)]
    )[:, seen]
    truth = read_out(layout, mask, whole, PLAIN)[seen]
    spread = truth * (dropout_p / (1 - dropout_p) / seeds) ** 0.5
    deviations = (drawn.mean(0) - truth) / spread
    assert deviations.abs().max() < 4.5 and 0.85 < deviations.std() < 1.15
    left_out = (drawn == 0).double().mean()
    assert abs(left_out - dropout_p) < 4 * (dropout_p * (1 - dropout_p) / drawn.numel()) ** 0.5


# Tests of the error that a ring of eight adds to that of one kernel call.


def errors(size, mask, whole, kernel):
    """Root mean square error of the output and of each gradient, relative to its root mean square."""
    pairs = zip(ring(zigzag(mask.length, size), mask, whole, kernel), dense(mask, *whole))
    return torch.stack([(got.double() - truth).norm() / truth.norm() for got, truth in pairs])


def sum_in(dtype, monkeypatch):
    """Make the ring keep its sums in `dtype`: round them after each addition, and when they travel."""

    def merge(output, *args, merge_=planned_ring.merge_):
        merge_(output, *args)
        output.copy_(output.to(dtype))

    def add(rows, *args, add=planned_ring._Sum.add):
        add(rows, *args)
        rows.total().copy_(rows.total().to(dtype))

    def post(exchange, sends, receives, post=SimulatedExchange.post):
        for _, tensor in sends:
            tensor.copy_(tensor.to(dtype))
        return post(exchange, sends, receives)

    monkeypatch.setattr(planned_ring, "merge_", merge)
    monkeypatch.setattr(planned_ring._Sum, "add", add)
    monkeypatch.setattr(SimulatedExchange, "post", post)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_does_not_grow_with_the_ring(dtype, kernel, monkeypatch):
    mask = Mask(256, whole_rows(1, 256), Pattern(causal=False))
    whole = tensors(mask, dtype=dtype)
    alone, two, eight = (errors(size, mask, whole, kernel) for size in (1, 2, 8))
    sum_in(dtype, monkeypatch)
    naive = errors(8, mask, whole, kernel)
    assert (eight <= 1.2 * two).all() and (two <= 1.5 * alone).all()
    assert (1.25 * eight < naive).all()
