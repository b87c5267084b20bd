"""Attention sinks: one more score for each head, which every query has in addition to the scores of its keys.

The value of a sink is 0. Sinks are applied once, to the output over all keys, on the rank that holds the query. So
their gradient is a sum over the queries of this rank, as for any other parameter. Sources: Xiao et al., "Efficient
Streaming Language Models with Attention Sinks" (2023, arXiv:2309.17453); as a learnable score, gpt-oss.
"""

from __future__ import annotations

import torch


def add_sinks(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Add the sinks `[H]` to an output `[T, H, D]`, in place, given its LSE `[T, H]` over keys.

    The output of a query that reads no key stays 0.

    Returns:
        The LSE `[T, H]` over keys and sinks.
    """
    merged = torch.logaddexp(lse, sinks.to(lse.dtype))
    weight = (lse - merged).exp_().masked_fill_(lse == float("-inf"), 0.0)  # where it is NaN if the sink is -inf too
    output.mul_(weight.unsqueeze(-1))
    return merged


def sinks_gradient(
    grad_output: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    """Gradient `[H]` of the sinks over the queries of this rank, given the output and the LSE with sinks.

    The gradient of a score is weight * (gradient of the weight - sum of weight * gradient over all weights). The value
    of a sink is 0, so the gradient of its weight is 0. The sum equals the product of the output and its gradient.
    """
    weights = (sinks.to(lse.dtype) - lse).exp()
    along = (grad_output.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
    return -(weights * along).sum(0).to(sinks.dtype)
