"""Helpers of the tests of whole sequences: a batch, and its loss and gradients on shards."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.helpers.models import some_labels, tokens


def batch_of(rows: int = 1, length: int = 30, **others) -> dict[str, torch.Tensor]:
    input_ids = tokens(rows, length)
    return {"input_ids": input_ids, "labels": some_labels(input_ids), **others}


def loss_and_gradients(model, batch, cp, prepare=lambda model: model) -> list[torch.Tensor]:
    """Compute the loss and every gradient, summed over the ranks."""
    model.zero_grad(set_to_none=True)
    run = prepare(model)
    with cp.shard(batch, run) as local:
        loss = run(**local).loss
        loss.backward()
    results = [loss.detach()] + [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    results = [torch.zeros(()) if x is None else x.clone() for x in results]
    for result in results:
        if dist.is_initialized():
            dist.all_reduce(result)
    return results


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    assert len(found) == len(expected) > 1
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(found, expected))
