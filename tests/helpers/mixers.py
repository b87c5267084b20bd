"""Helpers of the tests of mixers: shards of all ranks in one process, batches, and calls that are recorded."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st

from hf_context_parallel.config import ContextParallelConfig
from hf_context_parallel.data.batch import SHARD
from hf_context_parallel.data.shard import Shard, shard_batch
from hf_context_parallel.integration.mixers import halo
from hf_context_parallel.integration.model_registry import NAME
from hf_context_parallel.integration.switches import allow_unchecked_models
from hf_context_parallel.verification.types.tiny import tiny_config, tiny_model
from tests.helpers.models import context, document_positions, some_labels, tokens


class Ranks:
    """A process group simulated by threads, with an `all_to_all` between them."""

    def __init__(self, size: int):
        self.size = size
        self._sent: list[tuple[torch.Tensor, ...]] = [()] * size
        self._barrier = threading.Barrier(size, timeout=20)
        self._here = threading.local()

    def all_to_all(self, rows, sends, receives, _group):
        rank = self._here.rank
        self._sent[rank] = rows.split(sends)
        self._barrier.wait()
        received = [sent[rank] for sent in self._sent]
        self._barrier.wait()
        assert [len(part) for part in received] == receives
        return torch.cat(received).clone()

    def __call__(self, function: Callable[[int], object]) -> list:
        """Return the results of `function(rank)` for all ranks."""
        results: list = [None] * self.size

        def run(rank: int) -> None:
            self._here.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                self._barrier.abort()
                results[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


@st.composite
def shards(draw) -> list[Shard]:
    """Draw the shards of a batch: rows of one sequence, or packed rows, with some documents of a single token."""
    size, layout = draw(st.integers(1, 5)), draw(st.sampled_from(["zigzag", "contiguous"]))
    if draw(st.booleans()):
        positions = document_positions(*draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)))
        batch = {"input_ids": tokens(1, positions.shape[1]), "position_ids": positions}
    else:
        batch = {"input_ids": tokens(draw(st.integers(1, 3)), draw(st.integers(1, 30)))}
    config = ContextParallelConfig(size=size, layout=layout)
    return [shard_batch(batch, config, rank)[SHARD] for rank in range(size)]


def local_part(x: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Return the tokens of a rank of `[B, S, ...]`. The padding of the layout is large, and must not matter."""
    padding = torch.full((x.shape[0], shard.layout.length - shard.length, *x.shape[2:]), 1e3, dtype=x.dtype)
    return torch.cat([x, padding], dim=1).index_select(1, shard.layout.positions(shard.rank))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same_on_shards(every: list[Shard], tensors: list[torch.Tensor], shared: list[torch.Tensor], compute, truth):
    """Assert that `compute(rank, local tensors, shared)` on all ranks gives `truth(tensors, shared)`, with gradients.

    Args:
        shared: parameters, whose gradients are summed over the ranks.
    """
    expected = truth(tensors, shared)
    weights = random(*expected.shape)
    gradients = torch.autograd.grad((expected * weights).sum(), [*tensors, *shared])
    ranks = Ranks(len(every))

    def run(rank: int):
        local = [local_part(x.detach(), every[rank]).requires_grad_() for x in tensors]
        own = [x.detach().clone().requires_grad_() for x in shared]
        output = compute(rank, local, own)
        real = every[rank].layout.positions(rank) < every[rank].length
        assert not output[:, ~real].any()
        mine = torch.autograd.grad((output * local_part(weights, every[rank]))[:, real].sum(), [*local, *own])
        return output, local_part(expected, every[rank]), real, mine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halo, "all_to_all", ranks.all_to_all)
        results = ranks(run)
    for shard, (output, right, real, mine) in zip(every, results):
        assert torch.allclose(output[:, real], right[:, real], rtol=1e-12, atol=1e-12)
        for found, whole in zip(mine, gradients[: len(tensors)]):
            assert torch.allclose(found[:, real], local_part(whole, shard)[:, real], rtol=1e-12, atol=1e-12)
            assert not found[:, ~real].any()
    for index, whole in enumerate(gradients[len(tensors) :], start=len(tensors)):
        assert torch.allclose(sum(mine[index] for *_, mine in results), whole, rtol=1e-12, atol=1e-11)


def dense(length: int) -> dict[str, torch.Tensor]:
    input_ids = tokens(1, length)
    return {"input_ids": input_ids, "labels": some_labels(input_ids)}


def shapes_given(model_type: str, function: str, batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """Return the shape of the first argument in every call of a function of the modeling file, on a shard."""
    model = tiny_model(tiny_config(model_type), NAME)
    modeling, cp = importlib.import_module(type(model).__module__), context()
    original, seen = getattr(modeling, function), []

    def recorded(first, *args, **kwargs):
        seen.append(tuple(first.shape))
        return original(first, *args, **kwargs)

    with (
        pytest.MonkeyPatch.context() as patch,
        torch.no_grad(),
        allow_unchecked_models(),
        cp.shard(batch, model) as local,
    ):
        patch.setattr(modeling, function, recorded)
        model(**local)
        assert getattr(modeling, function) is recorded  # what was replaced meanwhile has been put back
    return seen
