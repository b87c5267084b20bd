"""Tests of what PyTorch's CPU operators are called with."""

import pytest
import torch

from hf_context_parallel.attention.kernels import cpu
from hf_context_parallel.planning.layout import zigzag
from tests.helpers.ring import MASKS, every_second_element, ring, tensors


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
