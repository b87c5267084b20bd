"""Tests of ring attention on simulated groups, compared with dense attention in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_context_parallel.attention.scores import Scores
from hf_context_parallel.planning.layout import zigzag
from hf_context_parallel.planning.mask import Mask, Pattern, whole_rows
from tests.helpers.examples import examples
from tests.helpers.ring import (
    EIGHT,
    HOW,
    KERNELS,
    MASKS,
    SCALE,
    SHAPES,
    SIZES,
    check,
    dense,
    every_second_element,
    ring,
    some_sinks,
    tensors,
)
from tests.helpers.simulated import SMALL, allowed, cases, padded


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, size, kernel):
    mask = MASKS[name]
    check(zigzag(mask.length, size), mask, tensors(mask), kernel)


@pytest.mark.parametrize("size, together", [(3, 2), (4, 2), (4, 3), pytest.param(8, 3, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", MASKS)
def test_keys_of_several_owners_in_a_step(name, size, together):
    mask = MASKS[name]
    check(zigzag(mask.length, size), mask, tensors(mask), together=together)


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


@examples(25)
@anything
def test_anything(case, kernel, key_heads, group, dims, softcap, with_sinks):
    fuzz(case, kernel, key_heads, group, dims, softcap, with_sinks)


@pytest.mark.exhaustive
@examples(1500)
@anything
def test_anything_exhaustively(case, kernel, key_heads, group, dims, softcap, with_sinks):
    fuzz(case, kernel, key_heads, group, dims, softcap, with_sinks)


def test_scores_that_differ_by_hundreds():
    mask = MASKS["one document"]
    query, *others = tensors(mask)
    check(zigzag(mask.length, 4), mask, [query * 100, *others])


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
