"""Attention sinks: a score a head that every query has beside those of its keys, with a value of 0.

They are applied once, to the output over all keys, on the rank that has the query. So their gradient is a sum over
this rank's queries, like that of any other parameter. Xiao et al., "Efficient Streaming Language Models with Attention
Sinks" (2023, arXiv:2309.17453); as a learnable score, in gpt-oss.
"""

from __future__ import annotations

import torch


def with_sinks(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output `[T, H, D]` and LSE `[T, H]` over keys as those over keys and the sinks `[H]`.

    A query that reads no key has output 0, as without sinks.
    """
    merged = torch.logaddexp(lse, sinks.to(lse.dtype))
    weight = (lse - merged).exp_().masked_fill_(lse == float("-inf"), 0.0)  # and a sink may be -inf as well
    return output * weight.unsqueeze(-1), merged


def sinks_gradient(
    grad_output: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    """The gradient of the sinks, of this rank's queries, given the output and LSE with them.

    A score's gradient is weight * (grad of the weight - sum over the weights of weight * grad); a sink's value, and so
    the gradient of its weight, is 0, and the sum is the product of the output and its gradient.
    """
    weights = (sinks.to(lse.dtype) - lse).exp()
    along = (grad_output.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
    return -(weights * along).sum(0).to(sinks.dtype)
